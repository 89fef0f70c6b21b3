// What the GPU lane does by itself, beside nvJPEG: say whether a JPEG is whole, and resize what nvJPEG has decoded.
//
// nvJPEG fills the holes of a damaged file and says nothing (LOG.md), so every entropy-coded segment is walked here: Huffman codes are
// decoded and counted, nothing is transformed. What is not whole is the CPU's to judge: a verdict other than SOUND costs time only,
// and SOUND must mean that libjpeg-turbo would find every block of the scan and have no complaint of it. The header's oddities are
// for `lanes.plain` to see.
//
// Written in C that a C++ compiler also takes, without CUDA, for the tests.

#if !defined(__CUDACC__) && !defined(__CUDACC_RTC__)
#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
struct Place { int x, y; };
static Place blockIdx, blockDim = {1, 1}, threadIdx, gridDim = {1, 1};
static void __syncthreads() {}
static int __syncthreads_or(int one) { return one; }
#endif

#define INLINE __device__ __forceinline__

typedef unsigned char u8;
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
// or 0; the tables of each block of an MCU.
struct Scan {
    const u8 *first, *end;
    i64 left, interval;
    int blocks;
    u8 dc[6], ac[6];
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

// Walks until a block begins at `limit` or behind it, or until `most` blocks are done: 0, CUT or BAD_CODE. What a bad code belongs to
// counts as a block, and an MCU begins after it. A turn is a symbol and not a block, so threads that walk side by side stay together.
static INLINE int walk(Stream *s, const Scan *scan, const Huffman *tables, int *block, const u8 *limit, i64 most, i64 *done) {
    int bad = 0, k = 0, now = *block;
    i64 blocks = 0;
    const Huffman *dc = tables + scan->dc[now], *ac = tables + scan->ac[now];
    while (blocks < most) {
        if (!k && s->at >= limit && mark_of(s, 0).at >= limit) break;
        int found = symbol(s, k ? ac : dc);
        if (found < 0) found = 1 << 8 | 0x10;  // which no file may say
        int size = found & 15, run = found >> 4 & 15, last = size == 0 && run != 15;
        skip(s, (found >> 8) + size);
        int after = !k ? 1 : last ? 64 : k + run + 1;
        if ((last && run) || after > 64 || (k && size > 10)) {
            bad = BAD_CODE;
            after = 64;
            now = -1;
        }
        k = after & 63;
        if (k) continue;
        if (s->beyond > s->have) return CUT;
        if (++now == scan->blocks) now = 0;
        dc = tables + scan->dc[now];
        ac = tables + scan->ac[now];
        blocks += 1;
    }
    *block = now;
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
// would have walked it, from its first bit on. Its last bytes are for `finish`, which knows how many blocks are left. The idea is
// that of Weissenberger and Schmidt, "Accelerating JPEG Decompression on GPUs" (2021), after Klein and Wiseman (2003).
#ifndef PIECES
#define PIECES 64  // of 400 photographs 276 are done after one walk, 102 after two, the slowest after nine
#endif
#define RUN_UP 512  // bytes; with 256 it is 153 of them after one walk, with 1,024 it is 374, for a third more to walk
#define REST 16

struct Piece {
    Mark begin, end, next;  // `next` is the end as the last walk found it
    i64 blocks;
    int bad;
};

static INLINE const u8 *border(const Scan *scan, int piece) {
    return scan->first + (scan->end - REST - scan->first) * piece / PIECES;
}

static INLINE void walk_piece(Piece *piece, const Scan *scan, const Huffman *tables, const u8 *limit) {
    Stream s = stream_at(piece->begin, scan->end);
    int block = piece->begin.block;
    piece->bad = walk(&s, scan, tables, &block, limit, scan->left, &piece->blocks);
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

// The verdict on a scan of which `pieces` are walked, or none if that is null.
static __device__ int finish(const Piece *pieces, const Scan *scan, const Huffman *tables) {
    Mark from = {scan->first, 0, 0};
    i64 left = scan->left, done;
    for (int i = 0; pieces && i < PIECES; i++) {
        if (pieces[i].bad) return pieces[i].bad;
        left -= pieces[i].blocks;
        from = pieces[i].end;
    }
    if (left < 0) return LEFT_OVER;
    Stream s = stream_at(from, scan->end);
    for (int restarts = 0;; restarts++) {
        i64 most = scan->interval && scan->interval < left ? scan->interval : left;
        int bad = walk(&s, scan, tables, &from.block, scan->end + 1, most, &done);
        if (bad) return bad;
        left -= most;
        int marker = marker_after(&s);
        if (!left) return marker == 0xD9 && s.at == s.end ? SOUND : LEFT_OVER;
        if (marker != 0xD0 + (restarts & 7)) return BAD_RESTART;
    }
}

// SOUND if a file's header is one of a sequential Huffman JPEG of three components in one scan, which is made known then; or ODD.
static __device__ int read_header(const u8 *data, i64 size, Huffman *tables, Scan *scan) {
    Component parts[3];
    int width = 0, height = 0, restart = 0, quantizers = 0;
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
            if (height || left != 15 || in[0] != 8 || in[5] != 3) return ODD;
            height = in[1] << 8 | in[2];
            width = in[3] << 8 | in[4];
            for (int c = 0; c < 3; c++) {
                Component part = {in[6 + 3 * c], in[7 + 3 * c] >> 4, in[7 + 3 * c] & 15, in[8 + 3 * c], 0, 0};
                if (part.wide < 1 || part.high < 1 || part.wide > 2 || part.high > part.wide) return ODD;
                if (c && (part.wide != 1 || part.high != 1)) return ODD;
                parts[c] = part;
            }
            if (!width || !height) return ODD;
        } else if (marker == 0xDB) {
            for (; left > 0; in += 65, left -= 65) {
                if (left < 65 || in[0] > 3) return ODD;  // 8 bits each, as a baseline file has them
                for (int i = 1; i < 65; i++) if (!in[i]) return ODD;
                quantizers |= 1 << in[0];
            }
        } else if (marker == 0xDD) {
            if (left != 2) return ODD;
            restart = in[0] << 8 | in[1];
        } else if (marker == 0xDA) {
            if (!height || left != 10 || in[0] != 3 || in[7] != 0 || in[8] != 63 || in[9] != 0) return ODD;
            for (int c = 0; c < 3; c++) {
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
    for (int c = 0; c < 3; c++)
        for (int block = 0; block < parts[c].wide * parts[c].high; block++, blocks++) {
            scan->dc[blocks] = (u8)parts[c].dc;
            scan->ac[blocks] = (u8)(2 + parts[c].ac);
        }
    scan->blocks = blocks;
    scan->left = across * down * blocks;
    scan->interval = (i64)restart * blocks;
    scan->first = data + at;
    scan->end = data + size;
    return SOUND;
}

// A block of threads an image. `starts` [count + 1] are places in `data`.
extern "C" __global__ void judge_all(const u8 *data, const i64 *starts, u8 *verdicts) {
    __shared__ Huffman tables[4];
    __shared__ Scan scan;
    __shared__ Piece pieces[PIECES];
    __shared__ int verdict;
    if (threadIdx.x == 0) verdict = read_header(data + starts[blockIdx.x], starts[blockIdx.x + 1] - starts[blockIdx.x], tables, &scan);
    __syncthreads();
    bool many = verdict == SOUND && !scan.interval && scan.end - scan.first > 64 * PIECES;
    if (many) walk_pieces(pieces, &scan, tables);
    if (threadIdx.x == 0) verdicts[blockIdx.x] = (u8)(verdict == SOUND ? finish(many ? pieces : 0, &scan, tables) : verdict);
}

// An antialiased resize of interleaved uint8 in two passes, in the integers of torch's own on a CPU, so that both give the same bytes.
// `images` [count, 7]: address, bytes a row, first row and rows that the second pass reads, place of these in `middle`, places of
// the two axes in `axes`. An axis: taps, bits of the weights, then of each step the first pixel and how many, then the weights.
enum { ADDRESS, PITCH, FIRST, ROWS, MIDDLE, ACROSS, DOWN, FIELDS };

static __device__ u8 rounded(int sum, int bits) {
    int level = sum >> bits;
    return (u8)(level < 0 ? 0 : level > 255 ? 255 : level);
}

// Along the rows: `middle` gets [rows, size, 3] of each image. Blocks: any number of an image, by images.
extern "C" __global__ void resize_rows(const i64 *images, const int *axes, u8 *middle, int size) {
    const i64 *image = images + FIELDS * blockIdx.y;
    const int *axis = axes + image[ACROSS];
    int taps = axis[0], bits = axis[1];
    for (i64 i = blockIdx.x * blockDim.x + threadIdx.x; i < image[ROWS] * size; i += gridDim.x * blockDim.x) {
        int step = i % size, first = axis[2 + 2 * step], count = axis[3 + 2 * step];
        const int *weights = axis + 2 + 2 * size + step * taps;
        const u8 *pixel = (const u8 *)image[ADDRESS] + (image[FIRST] + i / size) * image[PITCH] + 3 * first;
        int red = 1 << (bits - 1), green = red, blue = red;
        for (int tap = 0; tap < count; tap++, pixel += 3) {
            red += pixel[0] * weights[tap];
            green += pixel[1] * weights[tap];
            blue += pixel[2] * weights[tap];
        }
        u8 *to = middle + image[MIDDLE] + 3 * i;
        to[0] = rounded(red, bits);
        to[1] = rounded(green, bits);
        to[2] = rounded(blue, bits);
    }
}

// Along the columns: `out` gets [3, size, size] of each image. Blocks as before.
extern "C" __global__ void resize_columns(const i64 *images, const int *axes, const u8 *middle, u8 *out, int size) {
    const i64 *image = images + FIELDS * blockIdx.y;
    const int *axis = axes + image[DOWN];
    int taps = axis[0], bits = axis[1];
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < size * size; i += gridDim.x * blockDim.x) {
        int step = i / size, first = axis[2 + 2 * step], count = axis[3 + 2 * step];
        const int *weights = axis + 2 + 2 * size + step * taps;
        const u8 *pixel = middle + image[MIDDLE] + ((first - image[FIRST]) * size + i % size) * 3;
        int red = 1 << (bits - 1), green = red, blue = red;
        for (int tap = 0; tap < count; tap++, pixel += 3 * size) {
            red += pixel[0] * weights[tap];
            green += pixel[1] * weights[tap];
            blue += pixel[2] * weights[tap];
        }
        u8 *to = out + blockIdx.y * (i64)(3 * size * size) + i;
        to[0] = rounded(red, bits);
        to[size * size] = rounded(green, bits);
        to[2 * size * size] = rounded(blue, bits);
    }
}
