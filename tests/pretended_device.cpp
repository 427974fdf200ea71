// Copyright (c) MONAI Consortium
// Licensed under the Apache License, Version 2.0 (the "License");
// you may not use this file except in compliance with the License.
// You may obtain a copy of the License at
//     http://www.apache.org/licenses/LICENSE-2.0
// Unless required by applicable law or agreed to in writing, software
// distributed under the License is distributed on an "AS IS" BASIS,
// WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
// See the License for the specific language governing permissions and
// limitations under the License.

// A device for tests, in host memory: every operator is computed by the CPU's kernel, but its tensors do not mix with
// CPU tensors, autocast follows CUDA's rules, and what would make the host wait for CUDA is counted.

#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

using at::Tensor;
using std::optional;
constexpr auto kKind = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kKind, 0);

// ---- what is counted ----

std::atomic<int64_t> waits{0};         // of the host for the device
thread_local int computing = 0;        // inside a kernel: what it copies for itself does not count
std::mutex names_lock;
std::set<std::string> operators;       // that have run

struct Computing {
  Computing() { ++computing; }
  ~Computing() { --computing; }
};

void wait() {
  if (!computing) ++waits;
}

// ---- one device, one stream, host memory ----

struct Guard final : c10::impl::DeviceGuardImplInterface {
  const c10::Stream stream{c10::Stream::DEFAULT, kDevice};
  c10::DeviceType type() const override { return kKind; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return stream; }
  c10::Stream getDefaultStream(c10::Device) const override { return stream; }
  c10::Stream exchangeStream(c10::Stream) const override { return stream; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct HostMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto memory = c10::GetCPUAllocator()->allocate(bytes);
    auto* start = memory.get();
    auto* context = memory.release_context();
    return {start, context, c10::GetCPUAllocator()->raw_deleter(), kDevice};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
HostMemory host_memory;
REGISTER_ALLOCATOR(kKind, &host_memory);

struct Hooks final : at::PrivateUse1HooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};
const bool hooked = (at::RegisterPrivateUse1HooksInterface(new Hooks()), true);

bool is_here(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kKind; }

// A CPU tensor over the same memory.
Tensor on_host(const Tensor& tensor) {
  if (!is_here(tensor)) return tensor;
  const auto options = tensor.options().device(c10::kCPU).requires_grad(false);
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), options);
}

Tensor to_here(const Tensor& tensor) { return tensor.defined() ? tensor.to(kDevice) : tensor; }

// As on CUDA: a CPU tensor may take part only if it is a single number.
void refuse_mixture(const std::string& name, const std::vector<Tensor>& tensors) {
  const auto any_here = std::any_of(tensors.begin(), tensors.end(), is_here);
  for (const auto& tensor : tensors) {
    TORCH_CHECK(!any_here || !tensor.defined() || !tensor.is_cpu() || tensor.dim() == 0,
                "Expected all tensors to be on the same device, but ", name, " got one of shape ", tensor.sizes(),
                " on the CPU beside one on ", kDevice);
  }
}

// ---- memory, views and copies ----

Tensor empty(at::IntArrayRef size, optional<at::ScalarType> type, optional<at::Layout>, optional<at::Device>,
             optional<bool>, optional<at::MemoryFormat> format) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &host_memory, keys, c10::dtype_or_default(type), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, optional<at::ScalarType> type, optional<at::Layout>,
                     optional<at::Device>, optional<bool>) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &host_memory, keys, c10::dtype_or_default(type));
}

Tensor view(const Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor as_strided(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                  optional<c10::SymInt> offset) {
  optional<int64_t> start;
  if (offset) start = offset->guard_int(__FILE__, __LINE__);
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size), strides = C10_AS_INTARRAYREF_SLOW(stride);
  return at::native::as_strided_tensorimpl(self, sizes, strides, start);
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  if (is_here(self) && to.is_cpu()) wait();
  on_host(to).copy_(on_host(self));
  return to;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  to.resize_(self.sizes());
  return copy_from(self, to, false);
}

at::Scalar number(const Tensor& self) {
  wait();
  return on_host(self).item();
}

Tensor& set_storage(Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, storage, offset, size, stride);
}

Tensor& set_whole_storage(Tensor& self, at::Storage storage) { return at::native::set_(self, storage); }

// ---- computing ----

// Operators whose result has a size, or is a truth, that the host must know; a mask as index is one `nonzero`.
const std::set<std::string> kWaiting{
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::equal", "aten::bincount"};
// Operators that take indices from the CPU.
const std::set<std::string> kIndexing{
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"};

void compute_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().operator_name().name;
  std::vector<Tensor> tensors;
  for (const auto& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (argument.isTensor()) {
      tensors.push_back(argument.toTensor());
    } else if (argument.isTensorList()) {
      for (const Tensor& tensor : argument.toTensorVector()) tensors.push_back(tensor);
    }
  }
  if (!kIndexing.count(name)) refuse_mixture(name, tensors);
  if (kWaiting.count(name)) wait();
  {
    const std::lock_guard<std::mutex> lock(names_lock);
    operators.insert(name);
  }
  const Computing inside;
  at::native::cpu_fallback(op, stack);
}

Tensor convolution(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef more,
                   int64_t groups) {
  refuse_mixture("convolution", {input, weight, bias.value_or(Tensor())});
  TORCH_CHECK(input.scalar_type() == weight.scalar_type(), "Input type (", input.scalar_type(), ") and weight type (",
              weight.scalar_type(), ") should be the same");
  const Computing inside;
  optional<Tensor> shift;
  if (bias && bias->defined()) shift = on_host(*bias);
  return to_here(at::convolution(on_host(input), on_host(weight), shift, stride, padding, dilation, transposed, more,
                                 groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& input, const Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, bool transposed, at::IntArrayRef more, int64_t groups, std::array<bool, 3> wanted) {
  refuse_mixture("convolution_backward", {gradient, input, weight});
  const Computing inside;
  const std::vector<int64_t> bias{transposed ? weight.size(1) * groups : weight.size(0)};
  const auto [of_input, of_weight, of_bias] =
      at::convolution_backward(on_host(gradient), on_host(input), on_host(weight), at::OptionalIntArrayRef(bias),
                               stride, padding, dilation, transposed, more, groups, wanted);
  return {to_here(of_input), to_here(of_weight), to_here(of_bias)};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute_on_host>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", at::native::resize_);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("view", view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("as_strided", as_strided);
  m.impl("unfold", at::native::unfold);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", number);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}

// ---- autocast, by torch's lists for CUDA ----

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

#define IN_HALF_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define IN_FULL_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define WITH_FULL_RESULT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define IN_THE_WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(IN_HALF_PRECISION)
  AT_FORALL_FP32(IN_FULL_PRECISION)
  AT_FORALL_FP32_SET_OPT_DTYPE(WITH_FULL_RESULT)
  AT_FORALL_PROMOTE(IN_THE_WIDEST)
}

// ---- what tests ask ----

TORCH_LIBRARY(pretended_device, m) {
  m.def("waits() -> int", [] { return waits.load(); });
  m.def("take_operators() -> str[]", [] {
    const std::lock_guard<std::mutex> lock(names_lock);
    std::vector<std::string> names(operators.begin(), operators.end());
    operators.clear();
    return names;
  });
}

}  // namespace
