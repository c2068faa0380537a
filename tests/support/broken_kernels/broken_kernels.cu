// A correct kernel and the ways to break it, to show that host execution notices. `main BUG` exits 0 if the result is
// right, 1 and a line if it is not.
//
// The kernel sums each row of a [rows, kWidth] matrix and counts its positive elements. A block owns two rows, one
// after the other.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

#include "device.cuh"

enum Bug {
  kNone,
  kMissingBarrier,        // before the sums of the other threads are read
  kMissingSecondBarrier,  // before the next row overwrites what slower threads still read
  kOffByOne,              // one element beyond the shared array
  kUninitialised,         // the last warp does not write its slot
  kWrongMask,             // the lanes beyond the row vote too
  kThreadsLeave,          // before a barrier that the others wait at
  kTwoBarriers,           // the halves of a block wait at different ones
  kPartialWarp,           // a shuffle that names all lanes in a branch of some
};

constexpr int kBlock = 128, kWarps = kBlock / 32, kWidth = 200;

template <Bug kBug>
__global__ void row_sums(const float* x, float* sums, int* positive, int rows) {
  SHARED_ARRAY(float, partial, kWarps);
  SHARED_ARRAY(int, votes, kWarps);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int row = blockIdx.x * 2; row < rows && row < static_cast<int>(blockIdx.x) * 2 + 2; ++row) {
    float sum = 0.0f;
    int count = 0;
    for (int i = 0; i < kWidth; i += kBlock) {
      const int at = i + threadIdx.x;
      const float v = at < kWidth ? x[row * kWidth + at] : 1.0f;
      if (at < kWidth) sum += v;
      const unsigned inside = __ballot_sync(0xffffffffu, kBug == kWrongMask || at < kWidth);
      count += __builtin_popcount(__ballot_sync(0xffffffffu, v > 0.0f) & inside);
    }
    if (kBug == kPartialWarp && lane < 16) sum += __shfl_xor_sync(0xffffffffu, sum, 8);
    for (int bit = 16; bit > 0; bit /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
    if (lane == 0 && !(kBug == kUninitialised && warp == kWarps - 1)) {
      partial[warp] = sum;
      votes[warp] = count;
    }
    if (kBug == kThreadsLeave && threadIdx.x >= 96) return;
    if (kBug == kTwoBarriers && warp >= 2) {
      __syncthreads();
    } else if (kBug != kMissingBarrier) {
      __syncthreads();
    }
    // Every thread adds up; the first writes. So that all of them read what the warps left behind.
    float total = 0.0f;
    int all = 0;
    for (int w = 0; w < kWarps + (kBug == kOffByOne); ++w) {
      total += partial[w];
      all += w < kWarps ? votes[w] : 0;
    }
    if (threadIdx.x == 127) {
      sums[row] = total;
      positive[row] = all;
    }
    if (kBug != kMissingSecondBarrier) __syncthreads();
  }
}

template <Bug kBug>
int run() {
  constexpr int kRows = 5;
  std::vector<float> x(kRows * kWidth), sums(kRows, -1.0f);
  std::vector<int> positive(kRows, -1);
  for (int i = 0; i < kRows * kWidth; ++i) x[i] = static_cast<float>(i * 37 % 101 - 50);
  host::launch(dim3((kRows + 1) / 2), dim3(kBlock), 0,
               [&] { row_sums<kBug>(x.data(), sums.data(), positive.data(), kRows); });
  for (int row = 0; row < kRows; ++row) {
    float sum = 0.0f;
    int count = 0;
    for (int i = 0; i < kWidth; ++i) {
      sum += x[row * kWidth + i];
      count += x[row * kWidth + i] > 0.0f;
    }
    if (sums[row] != sum || positive[row] != count) {
      std::printf("row %d: sum %g and count %d, expected %g and %d\n", row, sums[row], positive[row], sum, count);
      return 1;
    }
  }
  return 0;
}

int main(int, char** arguments) {
  constexpr int (*kRuns[])() = {run<kNone>,         run<kMissingBarrier>, run<kMissingSecondBarrier>,
                                run<kOffByOne>,     run<kUninitialised>,  run<kWrongMask>,
                                run<kThreadsLeave>, run<kTwoBarriers>,    run<kPartialWarp>};
  try {
    return kRuns[std::atoi(arguments[1])]();
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
