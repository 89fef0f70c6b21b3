// From a JPEG file to its coefficients, by many threads: the first half of the GPU lane's decoder; `pixels.cu` is the second.
//
// Whether a file is whole is found on the way. What is not is the CPU's to judge: a verdict other than SOUND costs time only, and
// SOUND must mean that libjpeg-turbo would find every block of the scan and have no complaint of it. The header's oddities are for
// `lanes.plain` to see.
//
// Written in C that a C++ compiler also takes, without CUDA, for the tests.

#if !defined(__CUDACC__) && !defined(__CUDACC_RTC__)
#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __noinline__
struct Place { int x, y; };
static Place blockIdx, blockDim = {1, 1}, threadIdx, gridDim = {1, 1};
static void __syncthreads() {}
static int __syncthreads_or(int one) { return one; }
#endif

#define INLINE __device__ __forceinline__
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

typedef unsigned char u8;
typedef short i16;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

enum Verdict { SOUND = 0, ODD = 1, CUT = 2, BAD_CODE = 3, LEFT_OVER = 4, BAD_RESTART = 5 };

#define LOOK 10  // bits that one look-up sees; longer codes are 1 % of the symbols

struct Huffman {
    u16 look[1 << LOOK];  // length << 8 | symbol; 0 where the code is longer, or is none
    int most[17];         // the greatest code of each length, -1 for none
    int shift[17];        // symbol's place = code + shift
    u8 symbols[256];
    int made;
};

struct Component { int id, wide, high, quantizer, dc, ac; };

// What the second half wants to know of a file: its components, 1 for grey; pixels of the first for one of the others, MCUs, and by
// component what its coefficients are multiplied with, in the order of the file.
struct Frame {
    int parts, wide, high, across, down;
    u8 quantizers[3][64];
};

struct Stream {
    const u8 *at, *end;
    u64 bits;    // the next ones, left-aligned
    int have;    // how many of them
    int beyond;  // of these, zeros that stand for bits after the end of the data
};

// Four bytes from anywhere, the first one highest. Reads whole words: up to three bytes before and after them.
static INLINE u32 word(const u8 *at) {
    const u32 *words = (const u32 *)((u64)at & ~3ull);
    int shift = 8 * ((u64)at & 3);
    u32 raw = shift ? words[0] >> shift | words[1] << (32 - shift) : words[0];
    return raw << 24 | (raw << 8 & 0xFF0000) | (raw >> 8 & 0xFF00) | raw >> 24;
}

// More bits where one of the next bytes is no plain one: stuffed, a marker, or after the end.
static __device__ void fill_slowly(Stream *s) {
    while (s->have <= 32) {
        u64 byte = 0;
        if (s->at >= s->end) {
            s->beyond += 8;
        } else {
            byte = *s->at;
            if (byte != 0xFF) s->at += 1;
            else if (s->at + 1 < s->end && s->at[1] == 0) s->at += 2;
            else { byte = 0; s->beyond += 8; }  // a marker: it stays where it is
        }
        s->bits |= byte << (56 - s->have);
        s->have += 8;
    }
}

static INLINE void fill(Stream *s) {
    if (s->at + 4 <= s->end) {
        u32 next = word(s->at);
        if (!((~next - 0x01010101u) & next & 0x80808080u)) {  // no byte is 255
            s->bits |= (u64)next << (32 - s->have);
            s->have += 32;
            s->at += 4;
            return;
        }
    }
    Stream copy = *s;  // so that this one can stay in registers
    fill_slowly(&copy);
    *s = copy;
}

// The next symbol, with the length of its code << 8, which is still to be skipped; or -1 for a code that there is not. 32 bits are
// there then, enough for it and for the value behind it.
static INLINE int symbol(Stream *s, const Huffman *table) {
    if (s->have < 32) fill(s);
    u32 entry = table->look[s->bits >> (64 - LOOK)];
    if (entry) return (int)entry;
    for (int length = LOOK + 1; length <= 16; length++) {
        int code = (int)(s->bits >> (64 - length));
        if (code <= table->most[length]) return length << 8 | table->symbols[(code + table->shift[length]) & 255];
    }
    return -1;
}

static INLINE void skip(Stream *s, int count) {
    s->bits <<= count;
    s->have -= count;
}

// One table of a DHT segment, of symbols up to `greatest`; the bytes it takes, or 0 for a broken one.
static __device__ int make_table(Huffman *table, const u8 *counts, i64 left, int greatest) {
    int total = 0, code = 0, place = 0;
    if (left < 16) return 0;
    for (int length = 1; length <= 16; length++) total += counts[length - 1];
    if (total > 256 || left < 16 + total) return 0;
    for (int i = 0; i < total; i++) {
        if (counts[16 + i] > greatest) return 0;
        table->symbols[i] = counts[16 + i];
    }
    for (int i = 0; i < 1 << LOOK; i++) table->look[i] = 0;
    for (int length = 1; length <= 16; length++) {
        int count = counts[length - 1];
        table->shift[length] = place - code;
        table->most[length] = count ? code + count - 1 : -1;
        if (count && code + count >= 1 << length) return 0;  // no code is all ones
        for (int i = 0; i < count && length <= LOOK; i++) {
            int first = (code + i) << (LOOK - length);
            for (int fits = 0; fits < 1 << (LOOK - length); fits++)
                table->look[first + fits] = (u16)(length << 8 | table->symbols[place + i]);
        }
        code = (code + count) << 1;
        place += count;
    }
    table->made = 1;
    return 16 + total;
}

// What a header says of the scan: its first byte and the file's end; the blocks that are to come, of an MCU, and between two restarts
// or 0; of each block of an MCU the component and the tables.
struct Scan {
    const u8 *first, *end;
    i64 left, interval;
    int blocks;
    u8 part[6], dc[6], ac[6];
};

// Where a block begins: at `bit` of the byte at `at`; it is block `block` of its MCU.
struct Mark {
    const u8 *at;
    int bit, block;
};

static INLINE Stream stream_at(Mark mark, const u8 *end) {
    Stream s = {mark.at, end, 0, 0, 0};
    fill(&s);
    skip(&s, mark.bit);
    return s;
}

// Where the stream's next bit lies: bytes that were read ahead are counted back, and a 0 behind a 255 is none.
static INLINE Mark mark_of(const Stream *s, int block) {
    int unread = s->have - s->beyond;
    Mark mark = {s->at, -unread & 7, block};
    for (int bytes = (unread + 7) >> 3; bytes > 0; bytes--) mark.at -= mark.at[-1] == 0 && mark.at[-2] == 0xFF ? 2 : 1;
    return mark;
}

// The next `size` bits behind `length` others, as a coefficient.
static INLINE int value_of(const Stream *s, int length, int size) {
    if (!size) return 0;
    int bits = (int)(s->bits << length >> (64 - size));
    return bits < 1 << (size - 1) ? bits - (1 << size) + 1 : bits;
}

// Walks until a block begins at `limit` or behind it, or until `most` blocks are done: 0, CUT or BAD_CODE. What a bad code belongs to
// counts as a block, and an MCU begins after it. A turn is a symbol and not a block, so threads that walk side by side stay together.
// With `to` the blocks' coefficients that are not zero go there, 64 places for each, in the order of the file; the first of a block is
// a sum that goes on from `dc`, of three components.
//
// Not inline: for sm_100 NVRTC took 90 s with five copies of it, and takes 2 s so.
#ifndef WALK
#define WALK static __device__ __noinline__
#endif
WALK int walk(
    Stream *stream, const Scan *scan, const Huffman *tables, int *block, const u8 *limit, i64 most, i64 *done, i16 *to, int *dc_of
) {
    Stream copy = *stream, *s = &copy;  // that can stay in registers
    int bad = 0, k = 0, now = *block;
    i64 blocks = 0;
    const Huffman *dc = tables + scan->dc[now], *ac = tables + scan->ac[now];
    while (blocks < most) {
        if (!k && s->at >= limit && mark_of(s, 0).at >= limit) break;
        int found = symbol(s, k ? ac : dc);
        if (found < 0) found = 1 << 8 | 0x10;  // which no file may say
        int size = found & 15, run = found >> 4 & 15, last = size == 0 && run != 15;
        if (to && !k) to[0] = (i16)(dc_of[scan->part[now]] += value_of(s, found >> 8, size));
        if (to && k && size && k + run < 64) to[k + run] = (i16)value_of(s, found >> 8, size);
        skip(s, (found >> 8) + size);
        int after = !k ? 1 : last ? 64 : k + run + 1;
        if ((last && run) || after > 64 || (k && size > 10)) {
            bad = BAD_CODE;
            after = 64;
            now = -1;
        }
        k = after & 63;
        if (k) continue;
        if (s->beyond > s->have) {
            bad = CUT;
            break;
        }
        if (++now == scan->blocks) now = 0;
        dc = tables + scan->dc[now];
        ac = tables + scan->ac[now];
        if (to) to += 64;
        blocks += 1;
    }
    *stream = copy;
    *block = now < 0 ? 0 : now;  // the bad code was the last
    *done = blocks;
    return bad;
}

// After the last block of an interval: less than a byte is left, and then comes a marker. Its number, or 0.
static __device__ int marker_after(Stream *s) {
    if (s->have - s->beyond >= 8) return 0;
    while (s->at + 1 < s->end && s->at[0] == 0xFF && s->at[1] == 0xFF) s->at += 1;  // fill bytes
    if (s->at + 1 >= s->end || s->at[0] != 0xFF) return 0;
    int marker = s->at[1];
    s->at += 2;
    s->bits = 0;
    s->have = s->beyond = 0;
    return marker;
}

// A scan is walked in pieces, each by a thread of its own. Where the first block of a piece begins nobody knows, but a reader that
// begins anywhere soon falls in with the blocks as they are. So each piece begins where a run-up to it ends, and is walked again from
// where the piece before it has ended, if that is elsewhere, until nothing changes: what was walked then is the scan as one thread
// would have walked it, from its first bit on. Its last bytes are another piece, for one thread that knows how many blocks are left.
// Then all are walked once more, for their coefficients. The idea is that of Weissenberger and Schmidt, "Accelerating JPEG
// Decompression on GPUs" (2021), after Klein and Wiseman (2003).
#ifndef PIECES
#define PIECES 128
#endif
#define RUN_UP 512  // bytes; with 256 it is 153 of them after one walk, with 1,024 it is 374, for a third more to walk
#define REST 16

struct Piece {
    Mark begin, end, next;  // `next` is the end as the last walk found it
    i64 blocks, before;     // and those of the pieces before it
    int bad, dc[3];         // the sums of its first coefficients
};

static INLINE const u8 *border(const Scan *scan, int piece) {
    return scan->first + (scan->end - REST - scan->first) * piece / PIECES;
}

static INLINE void walk_piece(Piece *piece, const Scan *scan, const Huffman *tables, const u8 *limit) {
    Stream s = stream_at(piece->begin, scan->end);
    int block = piece->begin.block;
    piece->bad = walk(&s, scan, tables, &block, limit, scan->left, &piece->blocks, 0, 0);
    piece->next = mark_of(&s, block);
}

static __device__ void walk_pieces(Piece *pieces, const Scan *scan, const Huffman *tables) {
    for (int i = threadIdx.x; i < PIECES; i += blockDim.x) {
        const u8 *limit = border(scan, i + 1), *from = limit - RUN_UP > scan->first ? limit - RUN_UP : scan->first;
        if (from[0] == 0 && from[-1] == 0xFF) from += 1;
        pieces[i].begin = {from, 0, 0};
        walk_piece(pieces + i, scan, tables, limit);
        pieces[i].end = pieces[i].next;
        pieces[i].begin.at = 0;
    }
    __syncthreads();
    for (int changed = 1; changed;) {
        changed = 0;
        for (int i = threadIdx.x; i < PIECES; i += blockDim.x) {
            Mark begin = {scan->first, 0, 0}, before = pieces[i].begin;
            if (i) begin = pieces[i - 1].end;
            if (begin.at == before.at && begin.bit == before.bit && begin.block == before.block) continue;
            pieces[i].begin = begin;
            walk_piece(pieces + i, scan, tables, border(scan, i + 1));
            changed = 1;
        }
        changed = __syncthreads_or(changed);
        for (int i = threadIdx.x; i < PIECES; i += blockDim.x) pieces[i].end = pieces[i].next;
        __syncthreads();
    }
}

// One thread: the verdict on a scan whose pieces but the last are walked, or none if it is not `many`.
static __device__ int finish(Piece *pieces, bool many, const Scan *scan, const Huffman *tables) {
    Piece *rest = pieces + PIECES;
    rest->begin = {scan->first, 0, 0};
    rest->before = 0;
    for (int i = 0; many && i < PIECES; i++) {
        if (pieces[i].bad) return pieces[i].bad;
        pieces[i].before = rest->before;
        rest->before += pieces[i].blocks;
        rest->begin = pieces[i].end;
    }
    i64 left = scan->left - rest->before;
    if (left < 0) return LEFT_OVER;
    Stream s = stream_at(rest->begin, scan->end);
    int block = rest->begin.block, bad = walk(&s, scan, tables, &block, scan->end + 1, left, &rest->blocks, 0, 0);
    return bad ? bad : marker_after(&s) == 0xD9 && s.at == s.end ? SOUND : LEFT_OVER;
}

// The coefficients of a sound scan, 64 places a block, which are zeros before.
static __device__ void write_pieces(Piece *pieces, bool many, const Scan *scan, const Huffman *tables, i16 *to) {
    for (int i = threadIdx.x; i <= PIECES; i += blockDim.x) {
        Piece *piece = pieces + i;
        int dc[3] = {0, 0, 0}, block = piece->begin.block;
        i64 done;
        if (i == PIECES || many) {
            Stream s = stream_at(piece->begin, scan->end);
            walk(&s, scan, tables, &block, scan->end + 1, piece->blocks, &done, to + 64 * piece->before, dc);
        }
        for (int c = 0; c < 3; c++) piece->dc[c] = dc[c];
    }
    __syncthreads();
    if (!many) return;
    if (threadIdx.x == 0)  // each gets the sums of those before it
        for (int c = 0; c < 3; c++)
            for (int i = 0, sum = 0; i <= PIECES; i++) {
                int own = pieces[i].dc[c];
                pieces[i].dc[c] = sum;
                sum = (i16)(sum + own);  // as the coefficient is cut, which the sum of 8 MB could not hold
            }
    __syncthreads();
    for (int i = threadIdx.x; i <= PIECES; i += blockDim.x) {
        i16 *first = to + 64 * pieces[i].before;
        int block = pieces[i].begin.block;
        for (i64 done = 0; done < pieces[i].blocks; done++, first += 64) {
            first[0] = (i16)(first[0] + pieces[i].dc[scan->part[block]]);
            if (++block == scan->blocks) block = 0;
        }
    }
}

static INLINE const u8 *part(const Scan *scan, int piece) {
    return scan->first + (scan->end - 1 - scan->first) * piece / PIECES;
}

static INLINE bool is_restart(const u8 *at) { return at[0] == 0xFF && (at[1] & 0xF8) == 0xD0; }

// What lies between two restarts needs no run-up: its first byte stands behind a marker. All threads; the verdict of each on what
// begins in its part of the scan, `counts` being for all of them. The coefficients are written on the way.
static __device__ int walk_intervals(int *counts, const Scan *scan, const Huffman *tables, i16 *to) {
    for (int i = threadIdx.x; i < PIECES; i += blockDim.x) {
        counts[i] = 0;
        for (const u8 *at = part(scan, i); at < part(scan, i + 1); at++) counts[i] += is_restart(at);
    }
    __syncthreads();
    i64 all = (scan->left + scan->interval - 1) / scan->interval, found = 0;
    for (int i = 0; i < PIECES; i++) found += counts[i];
    if (found != all - 1) return BAD_RESTART;
    for (int i = threadIdx.x; i < PIECES; i += blockDim.x) {
        i64 number = 0;
        for (int before = 0; before < i; before++) number += counts[before];
        for (const u8 *at = i ? part(scan, i) : scan->first - 2; at < part(scan, i + 1); at++) {
            bool begins = at == scan->first - 2;  // the one interval before which no marker stands
            if (!begins && (at < scan->first || !is_restart(at))) continue;
            number += !begins;
            i64 done, behind = number * scan->interval, left = scan->left - behind;
            i64 most = left < scan->interval ? left : scan->interval;
            int dc[3] = {0, 0, 0}, block = 0;
            Stream s = stream_at({at + 2, 0, 0}, scan->end);
            int bad = walk(&s, scan, tables, &block, scan->end + 1, most, &done, to + 64 * behind, dc);
            if (bad) return bad;
            int marker = marker_after(&s);
            if (left > most ? marker != 0xD0 + (number & 7) : marker != 0xD9 || s.at != s.end) return BAD_RESTART;
        }
    }
    return SOUND;
}

// SOUND if a file's header is one of a sequential Huffman JPEG of one or three components in one scan, which is made known then;
// or ODD.
static __device__ int read_header(
    const u8 *data, i64 size, i64 wanted_width, i64 wanted_height, Huffman *tables, Scan *scan, Frame *frame
) {
    Component parts[3];
    i64 quantizers_at[4];
    int width = 0, height = 0, restart = 0, quantizers = 0, count = 0;
    i64 at = 2;
    for (int i = 0; i < 4; i++) tables[i].made = 0;
    if (size < 4 || data[0] != 0xFF || data[1] != 0xD8) return ODD;
    for (;;) {
        if (at + 4 > size || data[at] != 0xFF) return ODD;
        int marker = data[at + 1];
        if (marker == 0xFF) { at += 1; continue; }
        i64 length = data[at + 2] << 8 | data[at + 3];
        const u8 *in = data + at + 4;
        i64 left = length - 2;
        at += 2 + length;
        if (left < 0 || at > size) return ODD;
        if (marker == 0xC4) {
            while (left > 0) {
                int which = in[0];
                if (which >> 4 > 1 || (which & 15) > 1) return ODD;
                int took = make_table(tables + 2 * (which >> 4) + (which & 15), in + 1, left - 1, in[0] >> 4 ? 255 : 11);
                if (!took) return ODD;
                in += 1 + took;
                left -= 1 + took;
            }
        } else if (marker == 0xC0 || marker == 0xC1) {
            if (height || left < 6 || in[0] != 8) return ODD;
            count = in[5];
            if ((count != 1 && count != 3) || left != 6 + 3 * count) return ODD;
            height = in[1] << 8 | in[2];
            width = in[3] << 8 | in[4];
            for (int c = 0; c < count; c++) {
                Component part = {in[6 + 3 * c], in[7 + 3 * c] >> 4, in[7 + 3 * c] & 15, in[8 + 3 * c], 0, 0};
                if (part.wide < 1 || part.high < 1 || part.wide > 2 || part.high > part.wide) return ODD;
                if (c && (part.wide != 1 || part.high != 1)) return ODD;
                if (count == 1) part.wide = part.high = 1;  // of a scan of one component an MCU is a block
                parts[c] = part;
            }
            if (width != wanted_width || height != wanted_height || !width || !height) return ODD;
            if (parts[0].wide == 2 && width < 5) return ODD;  // whose colours libjpeg does not smooth
        } else if (marker == 0xDB) {
            for (; left > 0; in += 65, left -= 65) {
                if (left < 65 || in[0] > 3) return ODD;  // 8 bits each, as a baseline file has them
                for (int i = 1; i < 65; i++) if (!in[i]) return ODD;
                quantizers |= 1 << in[0];
                quantizers_at[in[0]] = in + 1 - data;
            }
        } else if (marker == 0xDD) {
            if (left != 2) return ODD;
            restart = in[0] << 8 | in[1];
        } else if (marker == 0xDA) {
            const u8 *behind = in + 1 + 2 * count;
            if (!height || left != 4 + 2 * count || in[0] != count || behind[0] != 0 || behind[1] != 63 || behind[2] != 0) return ODD;
            for (int c = 0; c < count; c++) {
                parts[c].dc = in[2 + 2 * c] >> 4;
                parts[c].ac = in[2 + 2 * c] & 15;
                if (in[1 + 2 * c] != parts[c].id || parts[c].dc > 1 || parts[c].ac > 1) return ODD;
                if (!tables[parts[c].dc].made || !tables[2 + parts[c].ac].made) return ODD;
                if (parts[c].quantizer > 3 || !(quantizers >> parts[c].quantizer & 1)) return ODD;
            }
            break;
        } else if (marker < 0xE0 || marker > 0xFE || (marker > 0xEF && marker < 0xFE)) {
            return ODD;  // progressive, arithmetic, lossless, hierarchical; an end or a restart before the scan
        }
    }
    i64 across = (width + 8 * parts[0].wide - 1) / (8 * parts[0].wide), down = (height + 8 * parts[0].high - 1) / (8 * parts[0].high);
    int blocks = 0;
    for (int c = 0; c < count; c++) {
        for (int block = 0; block < parts[c].wide * parts[c].high; block++, blocks++) {
            scan->part[blocks] = (u8)c;
            scan->dc[blocks] = (u8)parts[c].dc;
            scan->ac[blocks] = (u8)(2 + parts[c].ac);
        }
        for (int i = 0; i < 64; i++) frame->quantizers[c][i] = data[quantizers_at[parts[c].quantizer] + i];
    }
    frame->parts = count;
    frame->wide = parts[0].wide;
    frame->high = parts[0].high;
    frame->across = (int)across;
    frame->down = (int)down;
    scan->blocks = blocks;
    scan->left = across * down * blocks;
    scan->interval = (i64)restart * blocks;
    scan->first = data + at;
    scan->end = data + size;
    return SOUND;
}

// Of each image [FIELDS]: width and height; the place of its pixels, each side rounded up to 16, among those of all; the first row
// and column that the crop is made of, and how many; the place of its rows in `middle`, and of its two axes in `axes`.
enum { WIDTH, HEIGHT, PLACE, TOP, ROWS, LEFT, COLUMNS, MIDDLE, ACROSS, DOWN, FIELDS };

// A block of threads an image. `starts` [count + 1] are places in `data`. `coefficients` [3 * pixels]: 64 places for each block as they
// come in the file.
extern "C" __global__ void read_scans(
    const u8 *data, const i64 *starts, const i64 *images, i16 *coefficients, Frame *frames, u8 *verdicts
) {
    __shared__ Huffman tables[4];
    __shared__ Scan scan;
    __shared__ Piece pieces[PIECES + 1];
    __shared__ int verdict, counts[PIECES];
    const i64 *image = images + FIELDS * blockIdx.x, *start = starts + blockIdx.x;
    if (threadIdx.x == 0)
        verdict = read_header(data + start[0], start[1] - start[0], image[WIDTH], image[HEIGHT], tables, &scan, frames + blockIdx.x);
    __syncthreads();
    i16 *to = coefficients + 3 * image[PLACE];
    if (verdict == SOUND) {
        bool many = scan.end - scan.first > 64 * PIECES;
        for (i64 i = threadIdx.x; i < 16 * scan.left; i += blockDim.x) ((u64 *)to)[i] = 0;
        __syncthreads();
        if (scan.interval) {
            int found = walk_intervals(counts, &scan, tables, to);
            if (__syncthreads_or(found)) {
                if (threadIdx.x == 0) verdict = BAD_RESTART;
            }
        } else {
            if (many) walk_pieces(pieces, &scan, tables);
            if (threadIdx.x == 0) verdict = finish(pieces, many, &scan, tables);
            __syncthreads();
            if (verdict == SOUND) write_pieces(pieces, many, &scan, tables, to);
        }
    }
    if (threadIdx.x == 0) verdicts[blockIdx.x] = (u8)verdict;
}
