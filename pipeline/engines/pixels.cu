// From a JPEG's coefficients to its crop: the second half of the GPU lane's decoder, behind `jpeg.cu`, whose types it uses.
//
// The transform, the colours in between and the conversion have the integers of libjpeg's "islow" and its fancy upsampling, and the
// resize those of torch's on a CPU, so that the CPU's lane has the same bytes. Where the vector code of libjpeg-turbo would have
// to cut numbers off, in files that no encoder makes, the file is ODD.

// Where in the file's order the coefficients lie that belong to one line of the transform.
static __device__ const u8 ZIGZAG[64] = {
    0,  1,  5,  6,  14, 15, 27, 28, 2,  4,  7,  13, 16, 26, 29, 42, 3,  8,  12, 17, 25, 30, 41, 43, 9,  11, 18, 24, 31, 40, 44, 53,
    10, 19, 23, 32, 39, 45, 52, 54, 20, 22, 33, 38, 46, 51, 55, 60, 21, 34, 37, 47, 50, 56, 59, 61, 35, 36, 48, 49, 57, 58, 62, 63,
};

#define MOST 8191  // four of them fit into the 16 bits of vector code

// The inverse cosine transform of 8 numbers, `step` apart, after Loeffler, Ligtenberg and Moschytz (1989): products with 13 bits after
// the point, of whose sums `bits` are rounded away.
static INLINE void transform(int *line, int step, int bits) {
    int in0 = line[0], in1 = line[step], in2 = line[2 * step], in3 = line[3 * step];
    int in4 = line[4 * step], in5 = line[5 * step], in6 = line[6 * step], in7 = line[7 * step];
    int turn = (in2 + in6) * 4433, half = 1 << (bits - 1);
    int low = turn - in6 * 15137, high = turn + in2 * 6270;
    int sum = (in0 + in4) * 8192 + half, difference = (in0 - in4) * 8192 + half;
    int even[4] = {sum + high, difference + low, difference - low, sum - high};
    int both = (in7 + in3 + in5 + in1) * 9633;
    int a = (in7 + in1) * -7373, b = (in5 + in3) * -20995, c = (in7 + in3) * -16069 + both, d = (in5 + in1) * -3196 + both;
    int odd[4] = {in1 * 12299 + a + d, in3 * 25172 + b + c, in5 * 16819 + b + d, in7 * 2446 + a + c};
    for (int i = 0; i < 4; i++) {
        line[i * step] = (even[i] + odd[i]) >> bits;
        line[(7 - i) * step] = (even[i] - odd[i]) >> bits;
    }
}

static INLINE u8 level(int value) { return (u8)(value < 0 ? 0 : value > 255 ? 255 : value); }

// The planes of a frame, one behind the other, each as wide as its blocks.
struct Plane { int wide, high, pitch; i64 place; };

static INLINE Plane plane_of(const Frame *frame, int component) {
    i64 first = 64ll * frame->across * frame->down * frame->wide * frame->high, other = 64ll * frame->across * frame->down;
    if (!component) return {1, 1, 8 * frame->across * frame->wide, 0};
    return {frame->wide, frame->high, 8 * frame->across, first + (component - 1) * other};
}

// Does the crop need of these pixels, from `from` on, or of their neighbours, any from `first` to `first + count`?
static INLINE bool needed(i64 from, i64 pixels, i64 around, i64 first, i64 count) {
    return from - around < first + count && from + pixels + around > first;
}

// A thread a block of coefficients. Blocks of threads: any number of an image, by images. `planes` [3 * pixels].
extern "C" __global__ void transform_blocks(const i64 *images, const i16 *coefficients, const Frame *frames, u8 *planes, u8 *verdicts) {
    const i64 *image = images + FIELDS * blockIdx.y;
    const Frame *frame = frames + blockIdx.y;
    if (verdicts[blockIdx.y] != SOUND) return;
    int firsts = frame->wide * frame->high, blocks = firsts + frame->parts - 1, all = frame->across * frame->down * blocks;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < all; i += gridDim.x * blockDim.x) {
        int unit = i / blocks, within = i % blocks, component = within < firsts ? 0 : within - firsts + 1;
        Plane plane = plane_of(frame, component);
        int x = unit % frame->across, y = unit / frame->across;
        if (!component) {
            x = x * frame->wide + within % frame->wide;
            y = y * frame->high + within / frame->wide;
        }
        if (!needed(8 * y * plane.high, 8 * plane.high, plane.high, image[TOP], image[ROWS])) continue;
        if (!needed(8 * x * plane.wide, 8 * plane.wide, plane.wide, image[LEFT], image[COLUMNS])) continue;
        const u64 *from = (const u64 *)(coefficients + 3 * image[PLACE] + 64ll * i);
        const u8 *quantizer = frame->quantizers[component];
        u64 packed[16];
        int block[64], most = 0;
        for (int part = 0; part < 16; part++) packed[part] = from[part];
        UNROLL for (int at = 0; at < 64; at++) {
            int place = ZIGZAG[at];
            block[at] = (i16)(packed[place / 4] >> 16 * (place % 4)) * quantizer[place];
            most |= block[at] + MOST + 1;
        }
        if (most & ~(2 * MOST + 1)) {  // whose sums may not fit into 32 bits
            verdicts[blockIdx.y] = ODD;
            continue;
        }
        UNROLL for (int column = 0; column < 8; column++) transform(block + column, 8, 11);
        UNROLL for (int at = 0; at < 64; at++) most |= block[at] + MOST + 1;
        if (most & ~(2 * MOST + 1)) {
            verdicts[blockIdx.y] = ODD;
            continue;
        }
        u8 *to = planes + 3 * image[PLACE] + plane.place + 8ll * y * plane.pitch + 8 * x;
        UNROLL for (int row = 0; row < 8; row++, to += plane.pitch) {
            transform(block + 8 * row, 1, 18);
            u64 line = 0;
            UNROLL for (int column = 0; column < 8; column++) line |= (u64)level(block[8 * row + column] + 128) << 8 * column;
            *(u64 *)to = line;
        }
    }
}

// Three times the nearest sample and once the next one, along both axes as far as there is less of the colour than of the light.
static INLINE int colour_at(const u8 *plane, int pitch, int width, int height, int x, int y, const Frame *frame) {
    if (frame->wide == 1) return plane[(i64)y * pitch + x];
    int across = x >> 1, beside = x & 1 ? across + 1 : across - 1;
    beside = beside < 0 ? 0 : beside >= width ? width - 1 : beside;
    if (frame->high == 1) {
        const u8 *line = plane + (i64)y * pitch;
        return (3 * line[across] + line[beside] + 1 + (x & 1)) >> 2;
    }
    int down = y >> 1, below = y & 1 ? down + 1 : down - 1;
    below = below < 0 ? 0 : below >= height ? height - 1 : below;
    const u8 *near = plane + (i64)down * pitch, *next = plane + (i64)below * pitch;
    return (3 * (3 * near[across] + next[across]) + 3 * near[beside] + next[beside] + 8 - (x & 1)) >> 4;
}

// A thread a pixel that the crop needs: `pixels` gets [height, width, 3] of each image, at six times its place, where its
// coefficients were. Blocks as before.
extern "C" __global__ void colour_pixels(const i64 *images, const u8 *planes, const Frame *frames, const u8 *verdicts, u8 *pixels) {
    const i64 *image = images + FIELDS * blockIdx.y;
    const Frame *frame = frames + blockIdx.y;
    if (verdicts[blockIdx.y] != SOUND) return;
    int width = (int)image[WIDTH], height = (int)image[HEIGHT], columns = (int)image[COLUMNS];
    int wide = (width + frame->wide - 1) / frame->wide, high = (height + frame->high - 1) / frame->high;
    const u8 *own = planes + 3 * image[PLACE];
    Plane light = plane_of(frame, 0), blue = plane_of(frame, 1), red = plane_of(frame, 2);
    for (i64 i = blockIdx.x * blockDim.x + threadIdx.x; i < image[ROWS] * columns; i += gridDim.x * blockDim.x) {
        int x = (int)(image[LEFT] + i % columns), y = (int)(image[TOP] + i / columns);
        int bright = own[(i64)y * light.pitch + x];
        bool grey = frame->parts == 1;
        int cb = grey ? 0 : colour_at(own + blue.place, blue.pitch, wide, high, x, y, frame) - 128;
        int cr = grey ? 0 : colour_at(own + red.place, red.pitch, wide, high, x, y, frame) - 128;
        u8 *to = pixels + 6 * image[PLACE] + 3 * ((i64)y * width + x);
        to[0] = level(bright + ((91881 * cr + 32768) >> 16));
        to[1] = level(bright + ((-22554 * cb - 46802 * cr + 32768) >> 16));
        to[2] = level(bright + ((116130 * cb + 32768) >> 16));
    }
}

// An antialiased resize of interleaved uint8 in two passes, in the integers of torch's own on a CPU, so that both give the same bytes.
// An axis: taps, bits of the weights, then of each step the first pixel and how many, then the weights.
static __device__ u8 rounded(int sum, int bits) {
    return level(sum >> bits);
}

// Along the rows: `middle` gets [rows, size, 3] of each image. Blocks: any number of an image, by images.
extern "C" __global__ void resize_rows(const i64 *images, const int *axes, const u8 *pixels, u8 *middle, int size) {
    const i64 *image = images + FIELDS * blockIdx.y;
    const int *axis = axes + image[ACROSS];
    int taps = axis[0], bits = axis[1];
    for (i64 i = blockIdx.x * blockDim.x + threadIdx.x; i < image[ROWS] * size; i += gridDim.x * blockDim.x) {
        int step = i % size, first = axis[2 + 2 * step], count = axis[3 + 2 * step];
        const int *weights = axis + 2 + 2 * size + step * taps;
        const u8 *pixel = pixels + 6 * image[PLACE] + 3 * ((image[TOP] + i / size) * image[WIDTH] + first);
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
        const u8 *pixel = middle + image[MIDDLE] + ((first - image[TOP]) * size + i % size) * 3;
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
