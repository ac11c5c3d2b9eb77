#include "kernels/cuda/blas.h"

#include <algorithm>
#include <cstring>

#include "core/gpu.h"
#include "kernels/cuda/matmul_table.h"

namespace moemamba {

namespace {

constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;  // what NVIDIA advises for Hopper
constexpr int kMostCandidates = 64;

void blas_check(cublasStatus_t status, const char* what) {
  check(status == CUBLAS_STATUS_SUCCESS, "cuBLASLt: ", what, ": ",
        cublasLtGetStatusString(status));
}

cudaDataType_t type_of(DType dtype) { return dtype == DType::bf16 ? CUDA_R_16BF : CUDA_R_32F; }

uint32_t alignment_of(const void* address) {
  const auto bits = reinterpret_cast<uintptr_t>(address) | 16;
  return uint32_t(bits & (~bits + 1));
}

int64_t stride_of(const Tensor& tensor) {
  return std::max<int64_t>({1, tensor.rows() > 1 ? tensor.stride : 0, tensor.cols()});
}

// Both operands alike, and no result narrower than f32 operands.
bool dtypes_fit(const ProductShape& shape) {
  return shape.a == shape.b && (shape.a == DType::bf16 || shape.out == DType::f32);
}

// The table's lines were timed on 16-byte borders.
bool on_borders(const Product& product) {
  const int64_t in = size_of(product.shape.a), out = size_of(product.shape.out);
  return std::min({product.a_alignment, product.b_alignment, product.out_alignment}) == 16 &&
         product.a_stride * in % 16 == 0 && product.b_stride * in % 16 == 0 &&
         product.out_stride * out % 16 == 0;
}

template <class Value>
void prefer(cublasLtMatmulPreferenceOpaque_t& preference, cublasLtMatmulPreferenceAttributes_t what,
            Value value) {
  blas_check(cublasLtMatmulPreferenceSetAttribute(&preference, what, &value, sizeof(value)),
             "a preference");
}

}  // namespace

Product product_of(const Matmul& op) {
  return {.shape = {.M = op.out.rows(),
                    .N = op.out.cols(),
                    .K = op.a_transposed ? op.a.rows() : op.a.cols(),
                    .a_transposed = op.a_transposed,
                    .b_transposed = op.b_transposed,
                    .a = op.a.dtype,
                    .b = op.b.dtype,
                    .out = op.out.dtype,
                    .accumulate = op.accumulate},
          .a_stride = stride_of(op.a),
          .b_stride = stride_of(op.b),
          .out_stride = stride_of(op.out),
          .a_alignment = alignment_of(op.a.data),
          .b_alignment = alignment_of(op.b.data),
          .out_alignment = alignment_of(op.out.data)};
}

Blas::Blas() : workspace_(DeviceKind::cuda, kWorkspaceBytes) {
  gpu_name_ = gpu::devices()[size_t(gpu::used())].name;
  blas_check(cublasLtCreate(&handle_), "cublasLtCreate");
}

Blas::~Blas() { cublasLtDestroy(handle_); }

Blas& Blas::of(Stream& stream) {
  std::shared_ptr<void>& kept = stream.attachment();
  if (!kept) kept = std::make_shared<Blas>();
  return *static_cast<Blas*>(kept.get());
}

// CUBLAS_COMPUTE_32F: f32 operands are multiplied in f32 (never TF32), bf16 ones are added in f32.
Blas::Plan Blas::describe(const Product& product) const {
  Plan plan;
  const auto& [M, N, K, a_transposed, b_transposed, a, b, out, accumulate] = product.shape;
  blas_check(cublasLtMatmulDescInit(&plan.description, CUBLAS_COMPUTE_32F, CUDA_R_32F),
             "cublasLtMatmulDescInit");
  const auto transpose = [&](cublasLtMatmulDescAttributes_t which, bool transposed) {
    const cublasOperation_t operation = transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    blas_check(cublasLtMatmulDescSetAttribute(&plan.description, which, &operation,
                                              sizeof(operation)),
               "cublasLtMatmulDescSetAttribute");
  };
  transpose(CUBLASLT_MATMUL_DESC_TRANSA, b_transposed);
  transpose(CUBLASLT_MATMUL_DESC_TRANSB, a_transposed);
  const auto lay_out = [](cublasLtMatrixLayoutOpaque_t& layout, DType dtype, bool transposed,
                          int64_t rows, int64_t cols, int64_t stride) {
    if (transposed) std::swap(rows, cols);
    blas_check(cublasLtMatrixLayoutInit(&layout, type_of(dtype), uint64_t(cols), uint64_t(rows),
                                        stride),
               "cublasLtMatrixLayoutInit");
  };
  lay_out(plan.first, b, b_transposed, K, N, product.b_stride);
  lay_out(plan.second, a, a_transposed, M, K, product.a_stride);
  lay_out(plan.out, out, false, M, N, product.out_stride);
  return plan;
}

// What is allowed: a split of K only where a second kernel adds its parts, in f32 and in order.
int Blas::guess(Plan& plan, const Product& product,
                std::span<cublasLtMatmulHeuristicResult_t> to) {
  cublasLtMatmulPreferenceOpaque_t preference;
  blas_check(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit");
  prefer(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t(kWorkspaceBytes));
  prefer(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
         uint32_t(CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, product.b_alignment);
  prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, product.a_alignment);
  prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, product.out_alignment);
  prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, product.out_alignment);
  int count = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      handle_, &plan.description, &plan.first, &plan.second, &plan.out, &plan.out, &preference,
      int(to.size()), to.data(), &count);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED) return 0;
  blas_check(status, "cublasLtMatmulAlgoGetHeuristic");
  return count;
}

bool Blas::take_from_table(Plan& plan, const Product& product) {
  if (!on_borders(product)) return false;
  for (const TunedProduct& line : matmul_table()) {
    if (line.shape != product.shape || line.gpu != gpu_name_ ||
        line.version != cublasLtGetVersion())
      continue;
    static_assert(sizeof(plan.algorithm.data) == sizeof(line.algorithm));
    std::memcpy(plan.algorithm.data, line.algorithm.data(), sizeof(line.algorithm));
    cublasLtMatmulHeuristicResult_t result{};
    return cublasLtMatmulAlgoCheck(handle_, &plan.description, &plan.first, &plan.second, &plan.out,
                                   &plan.out, &plan.algorithm, &result) == CUBLAS_STATUS_SUCCESS &&
           result.workspaceSize <= size_t(kWorkspaceBytes);
  }
  return false;
}

// The table's algorithm, or the first of cuBLASLt's own list: a function of the product, the
// library and the GPU, never of a clock.
Blas::Plan& Blas::plan_of(const Matmul& op) {
  const Product product = product_of(op);
  const auto known = plans_.find(product);
  if (known != plans_.end()) return known->second;
  Plan plan;
  const bool fits = dtypes_fit(product.shape);
  if (fits) {
    plan = describe(product);
    plan.found = take_from_table(plan, product);
  }
  if (fits && !plan.found) {
    cublasLtMatmulHeuristicResult_t first[1]{};
    plan.found = guess(plan, product, first) > 0 && first[0].state == CUBLAS_STATUS_SUCCESS;
    plan.algorithm = first[0].algo;
  }
  return plans_.emplace(product, plan).first->second;
}

void Blas::enqueue(Stream& stream, const Matmul& op, Plan& plan,
                   const cublasLtMatmulAlgo_t& algorithm) {
  const float one = 1, beta = op.accumulate ? 1 : 0;
  blas_check(cublasLtMatmul(handle_, &plan.description, &one, op.b.data, &plan.first, op.a.data,
                            &plan.second, &beta, op.out.data, &plan.out, op.out.data, &plan.out,
                            &algorithm, workspace_.data(), size_t(kWorkspaceBytes),
                            static_cast<cudaStream_t>(stream.native())),
             "cublasLtMatmul");
}

bool Blas::takes(const Matmul& op) { return plan_of(op).found; }

bool Blas::multiply(Stream& stream, const Matmul& op) {
  Plan& plan = plan_of(op);
  if (plan.found) enqueue(stream, op, plan, plan.algorithm);
  return plan.found;
}

std::vector<cublasLtMatmulAlgo_t> Blas::candidates(const Matmul& op) {
  const Product product = product_of(op);
  if (!dtypes_fit(product.shape)) return {};
  Plan plan = describe(product);
  std::vector<cublasLtMatmulHeuristicResult_t> results(kMostCandidates);
  const int count = guess(plan, product, results);
  std::vector<cublasLtMatmulAlgo_t> list;
  for (int i = 0; i < count; ++i)
    if (results[size_t(i)].state == CUBLAS_STATUS_SUCCESS)
      list.push_back(results[size_t(i)].algo);
  return list;
}

bool Blas::multiply_by(Stream& stream, const Matmul& op, const cublasLtMatmulAlgo_t& algorithm) {
  Plan plan = describe(product_of(op));
  cublasLtMatmulHeuristicResult_t result{};
  const bool works =
      cublasLtMatmulAlgoCheck(handle_, &plan.description, &plan.first, &plan.second, &plan.out,
                              &plan.out, &algorithm, &result) == CUBLAS_STATUS_SUCCESS &&
      result.workspaceSize <= size_t(kWorkspaceBytes);
  if (works) enqueue(stream, op, plan, algorithm);
  return works;
}

std::vector<Product> Blas::products() const {
  std::vector<Product> list;
  for (const auto& [product, plan] : plans_)
    if (plan.found && on_borders(product)) list.push_back(product);
  return list;
}

bool blas_takes(Stream& stream, const Matmul& op) { return Blas::of(stream).takes(op); }

bool multiply_by_blas(Stream& stream, const Matmul& op) {
  return Blas::of(stream).multiply(stream, op);
}

}  // namespace moemamba
