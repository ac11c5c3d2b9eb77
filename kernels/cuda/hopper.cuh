#pragma once
#include <cuda.h>
#include <cudaTypedefs.h>

#include "kernels/cuda/common.cuh"

namespace moemamba {

// Hopper's own instructions (sm_90a): the tensor cores' wgmma on tiles in shared memory, copies of
// whole tiles (TMA), and the barriers they signal. Section names are those of the PTX ISA.
namespace hopper {

// Bytes of a tile's row. Eight rows make a pattern: the 16 bytes of piece p of row r lie at place
// p ^ r % 8, which copies write and wgmma reads by itself (CU_TENSOR_MAP_SWIZZLE_128B). Patterns
// begin on borders of 1024 bytes.
constexpr uint32_t kRowBytes = 128, kPatternBytes = 8 * kRowBytes;

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// --- Barriers ("Parallel Synchronization and Communication Instructions: mbarrier") --------------
// A phase ends when `arrivals` threads have arrived and all bytes that they expect have come.

__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After init_barrier, before the block's barrier: copies, too, see what was initialised.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Whether the phase of this parity has ended; sleeps a moment if not.
__device__ __forceinline__ bool has_ended(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(ended)
      : "r"(barrier), "r"(parity)
      : "memory");
  return ended != 0;
}
// The first phase has parity 0; the one before it counts as ended. Traps after seconds: a barrier
// that nobody serves is an error of ours, and must not hold the GPU.
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  for (int tries = 0; !has_ended(barrier, parity); ++tries)
    if (tries == 1 << 27) __trap();
}

// --- Copies ("Data Movement and Conversion Instructions: cp.async.bulk.tensor") ------------------

// Brings the map's box at (x, y, z) to shared memory; x runs along rows. Zeros where the tensor
// ends. Its bytes, zeros included, count for `barrier`. By one thread.
__device__ __forceinline__ void bring_box(uint32_t to, const CUtensorMap& map, uint32_t barrier,
                                          int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}
// Brings bytes into the L2 cache. REQUIRES: `from` and `bytes` are multiples of 16.
__device__ __forceinline__ void prefetch_bytes(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)),
               "r"(bytes)
               : "memory");
}
// What this thread has stored to shared memory comes before what copies and wgmma do there after
// the next barrier.
__device__ __forceinline__ void publish_stores() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- Registers ("Miscellaneous Instructions: setmaxnreg"), of all warps of a warpgroup -----------

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- Products ("Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions") -----------

// A matrix descriptor ("Matrix Descriptor Format"), of a tile whose patterns lie one after another:
//   bits  0-13  start address / 16
//   bits 16-29  leading dimension byte offset / 16. Tiles along K ("K-major"): not used with a
//               swizzle, 1 by convention. Across K ("MN-major"; canonical layout ((T,8,m),(8,k)) :
//               ((1,T,LBO),(8T,SBO)), T = 8 elements): from 64 of M or N to the next 64
//   bits 32-45  stride dimension byte offset / 16. Along K: from 8 rows of M or N to the next 8
//               (((8,m),(T,2k)) : ((8T,SBO),(1,T))). Across K: from 8 rows of K to the next 8.
//               Either way a pattern
//   bits 49-51  base offset: 0, patterns begin on borders of 1024
//   bits 62-63  1: 128-byte swizzle
// The swizzle is of addresses, so 16 of K further along K is 32 bytes further; across K, 16 rows.
// kPanelBytes: of 64 of M or N, all of a tile's K.
template <bool kAlongK, uint32_t kPanelBytes>
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  constexpr uint64_t kLeading = kAlongK ? 1 : kPanelBytes / 16, kStride = kPatternBytes / 16;
  return (uint64_t{1} << 62) | (kStride << 32) | (kLeading << 16) | (address >> 4);
}
template <bool kAlongK>
__device__ __forceinline__ uint32_t bytes_of_16() { return kAlongK ? 32 : 16 * kRowBytes; }

// Before the first product, and after other use of their registers ("wgmma.fence").
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Ends a group of products; they may still run.
__device__ __forceinline__ void end_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// All but the last kPending groups are done.
template <int kPending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Numbers of products that were waited for: the compiler reads them here, not before.
template <int kCount>
__device__ __forceinline__ void hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d (+)= a[64, 16] b[16, 256] of bf16, by a warpgroup. Its warp w holds rows 16 w .. 16 w + 15:
// lane 4 g + q has at d[4 j ..] columns 8 j + 2 q and 8 j + 2 q + 1 of row g, then of row g + 8
// ("Register Fragments and Shared Memory Matrix Layouts", accumulator D). The immediates are the
// factors' signs, then whether a and b lie across K (imm-trans-a, imm-trans-b).
template <bool kAAlongK, bool kBAlongK>
__device__ __forceinline__ void multiply_64_256_16(float (&d)[128], uint64_t a, uint64_t b,
                                                   bool add) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, "
      "%15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "
      "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, "
      "%45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
      "%60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, "
      "%75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, "
      "%90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, "
      "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, "
      "%120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, p, 1, 1, %131, %132;\n"
      "}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),
        "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
        "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),
        "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),
        "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),
        "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]),
        "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]),
        "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]), "+f"(d[65]),
        "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),
        "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]),
        "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]),
        "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]),
        "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]),
        "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]),
        "+f"(d[102]), "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]),
        "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]),
        "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]),
        "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]),
        "+f"(d[126]), "+f"(d[127])
      : "l"(a), "l"(b), "r"(int(add)), "n"(int(!kAAlongK)), "n"(int(!kBAlongK)));
}

// --- On the host ---------------------------------------------------------------------------------

// Whether this GPU has wgmma, and this program code of `kernel` for it: compiled for others, such a
// kernel has no body and so no barriers in shared memory.
template <class... Arguments>
bool runs_here(void (*kernel)(Arguments...)) {
  int device = 0, major = 0;
  cuda_check(cudaGetDevice(&device), "cudaGetDevice");
  cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
             "cudaDeviceGetAttribute");
  if (major != 9) return false;
  cudaFuncAttributes facts{};
  cuda_check(cudaFuncGetAttributes(&facts, kernel), "cudaFuncGetAttributes");
  return facts.sharedSizeBytes > 0;
}

// How TMA reads bf16 [depth, rows, cols], `cols` running fastest, in boxes of box_rows x box_cols
// elements that lie in shared memory as swizzled rows of 128 bytes ("Tensors" and
// cuTensorMapEncodeTiled). The function is the driver's, found at run time: machines without a GPU
// have no library to link. Costs about a microsecond of the host and reads nothing of the device's.
// REQUIRES: extents of at least 1; address and rows on borders of 16 bytes; box_cols is 64.
inline CUtensorMap tensor_map(const Tensor& tensor, uint64_t depth, uint64_t rows,
                              uint32_t box_cols, uint32_t box_rows) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                              cudaEnableDefault, &result),
             "cudaGetDriverEntryPointByVersion");
  check(result == cudaDriverEntryPointSuccess && found != nullptr,
        "the driver has no cuTensorMapEncodeTiled; it must be of CUDA 12 or later");
  const auto encode = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  const auto cols = uint64_t(tensor.cols());
  const uint64_t row_bytes =
      2 * (tensor.rows() > 1 ? uint64_t(tensor.stride) : (cols + 7) / 8 * 8);
  const cuuint64_t extents[] = {cols, rows, depth};
  const cuuint64_t strides[] = {row_bytes, row_bytes * rows};  // of the second and third, in bytes
  const cuuint32_t box[] = {box_cols, box_rows, 1}, steps[] = {1, 1, 1};
  CUtensorMap map;
  const CUresult code = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, tensor.data, extents,
                               strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(code == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", int(code), " for a tensor ",
        to_string(tensor.shape), " with rows ", row_bytes, " bytes apart");
  return map;
}

}  // namespace hopper

}  // namespace moemamba
