// One row of a table on the device: docs/architecture.md, section 3; backends/cuda/board.py fills the
// two blocks. All addresses and sizes are read from memory, so that a captured graph stays valid
// when a run brings other buffers. No contraction into fused multiply-adds (--fmad=false): the
// guided output is then that of the host, bit for bit.

#define INDEX ((long long)blockIdx.x * blockDim.x + threadIdx.x)

struct Run {              // of a whole run
    long long count;      // elements of x: B C h w
    long long picture;    // of one picture: C h w
    long long stride;     // of one picture as the network is given it: (C + joined) h w
    long long depth;      // rows that the table reaches back to
    long long slots;      // of each ring; more than depth
    long long row;        // int32: the row that runs
    long long bad;        // int32: the first row whose output is not finite
    long long weights;    // float [R, 2 depth] by age: of x, then of outputs
    long long fresh;      // float [R]: of noise
    long long guidance;   // float [R]
    long long times;      // float [R]
    long long xs;         // float [slots, count]: x_i lies in slot i % slots
    long long outs;       // float [slots, count]
    long long noise;      // float [count]: of this row
    long long mask;       // float [count]; 0: nothing is blended in
    long long latent;     // float [count]
    long long still;      // float [count]: the noise of what is blended in
    long long alphas;     // float [R]
    long long sigmas;     // float [R]
};

struct Call {             // of one kind of row
    long long sample[2];  // what the networks read: float [copies, B, C + joined, h, w]
    long long times[2];   // float [copies, B]
    long long copies[2];
    long long uncond;     // what they answered: float [count]; 0: the row is not guided
    long long cond;
};

#define FLOATS(address) ((float *)(address))

extern "C" __global__ void feed(const Run *run, const Call *call)
{
    const long long i = INDEX;
    if (i >= run->count) return;
    const long long row = *(const int *)run->row, batch = run->count / run->picture;
    const float x = FLOATS(run->xs)[row % run->slots * run->count + i];
    for (int k = 0; k < 2; k++)
        for (long long c = 0; c < call->copies[k]; c++) {
            const long long picture = c * batch + i / run->picture;
            FLOATS(call->sample[k])[picture * run->stride + i % run->picture] = x;
            if (i % run->picture == 0)
                FLOATS(call->times[k])[picture] = FLOATS(run->times)[row];
        }
}

extern "C" __global__ void advance(const Run *run, const Call *call)
{
    const long long i = INDEX, count = run->count;
    if (i >= count) return;
    const long long row = *(const int *)run->row;
    float out = FLOATS(call->cond)[i];
    if (call->uncond != 0) {
        const float uncond = FLOATS(call->uncond)[i];
        out = uncond + FLOATS(run->guidance)[row] * (out - uncond);
    }
    if (!(out - out == 0.0f) && *(int *)run->bad > row)
        *(int *)run->bad = (int)row;  // every thread of a row writes the same
    FLOATS(run->outs)[row % run->slots * count + i] = out;
    const float *weights = FLOATS(run->weights) + row * 2 * run->depth;
    float x = 0.0f;
    for (long long age = 0; age < run->depth && age <= row; age++) {
        const long long at = (row - age) % run->slots * count + i;
        x += weights[age] * FLOATS(run->xs)[at];
        x += weights[run->depth + age] * FLOATS(run->outs)[at];
    }
    const float fresh = FLOATS(run->fresh)[row];
    if (fresh != 0.0f) x += fresh * FLOATS(run->noise)[i];
    if (run->mask != 0) {
        const float mask = FLOATS(run->mask)[i];
        const float still = FLOATS(run->alphas)[row] * FLOATS(run->latent)[i]
                          + FLOATS(run->sigmas)[row] * FLOATS(run->still)[i];
        x = mask * x + (1.0f - mask) * still;
    }
    FLOATS(run->xs)[(row + 1) % run->slots * count + i] = x;
}

extern "C" __global__ void next_row(const Run *run, const Call *)
{
    if (INDEX == 0) *(int *)run->row += 1;
}
