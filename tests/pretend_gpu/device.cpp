// A pretend GPU in a torch that was built without CUDA: device type `cuda`, memory of the host, the CPU's kernels. What it does as a GPU
// does is to be another device: an operation that is given tensors of both fails, a copy that nobody waits for comes late, memory is counted.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/unfold_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <mutex>
#include <set>
#include <unordered_map>

namespace {

using at::IValue;
using at::Tensor;

const c10::Device GPU(c10::kCUDA, 0);
std::atomic<int64_t> in_use{0}, peak{0}, limit{INT64_MAX};  // bytes

struct Block {
  void* data;
  size_t nbytes;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  in_use -= block->nbytes;
  c10::GetCPUAllocator()->raw_deallocate(block->data);
  delete block;
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    if (nbytes == 0) return {nullptr, nullptr, &release_nothing, GPU};
    const bool fits = in_use + int64_t(nbytes) <= limit;
    TORCH_CHECK_WITH(OutOfMemoryError, fits, "pretend GPU: ", nbytes, " bytes more than it has");
    int64_t now = in_use += nbytes, most = peak;
    while (now > most && !peak.compare_exchange_weak(most, now)) {
    }
    void* data = c10::GetCPUAllocator()->raw_allocate(nbytes);
    return {data, new Block{data, nbytes}, &release, GPU};
  }
  static void release_nothing(void*) {}
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};
Memory memory;

std::mutex pinning;
std::set<const void*> pinned;

void unpin(void* data) {
  std::lock_guard<std::mutex> lock(pinning);
  pinned.erase(data);
  c10::GetCPUAllocator()->raw_deallocate(data);
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    void* data = c10::GetCPUAllocator()->raw_allocate(nbytes ? nbytes : 1);
    std::lock_guard<std::mutex> lock(pinning);
    pinned.insert(data);
    return {data, data, &unpin, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};
PinnedMemory pinned_memory;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::kCUDA;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return GPU; }
  c10::Device getDevice() const override { return GPU; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

Tensor on_cpu(const Tensor& t) {  // the same memory, as the CPU sees it
  if (!t.defined() || !t.is_cuda()) return t;
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), t.storage().nbytes(), c10::DataPtr(const_cast<void*>(t.storage().data()), c10::kCPU), c10::GetCPUAllocator(), true);
  auto out = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(std::move(storage)), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.is_conj()) out._set_conj(true);
  if (t.is_neg()) out._set_neg(true);
  return out;
}

Tensor new_on_gpu(const Tensor& t) {  // a copy
  if (!t.defined() || t.is_cuda()) return t;
  Tensor out = at::detail::empty_strided_generic(t.sizes(), t.strides(), &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), t.scalar_type());
  on_cpu(out).copy_(t);
  return out;
}

// A copy that nobody waits for, between the GPU and pinned memory, is seen as late as a GPU may finish it: the host sees it when it waits for
// the GPU, the GPU reads the host's memory when it next computes.
std::mutex waiting;
std::vector<std::function<void()>> to_host, to_gpu;

void run(std::vector<std::function<void()>>& copies) {
  std::vector<std::function<void()>> all;
  {
    std::lock_guard<std::mutex> lock(waiting);
    all.swap(copies);
  }
  for (auto& copy : all) copy();
}

void synchronize() {
  run(to_gpu);
  run(to_host);
}

// CUDA takes indices that lie on the host; all else, but numbers without a dimension, has to be on the GPU
bool is_index(const std::string& name, const Tensor& t) {
  static const std::set<std::string> operations = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
  return operations.count(name) > 0 && c10::isIntegralType(t.scalar_type(), /*includeBool=*/true);
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  run(to_gpu);
  const auto& schema = op.schema();
  if (schema.name() == "aten::_local_scalar_dense") synchronize();
  const std::string name = schema.operator_name().name + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  const size_t n = schema.arguments().size(), begin = stack->size() - n;
  std::vector<std::pair<Tensor, Tensor>> pairs;  // of the GPU, and as the CPU sees it
  std::vector<std::string> strangers;
  auto seen = [&](const Tensor& t) {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {
      if (t.dim() > 0 && !is_index(schema.name(), t)) strangers.push_back(c10::str(t.scalar_type(), t.sizes()));
      return t;
    }
    pairs.emplace_back(t, on_cpu(t));
    return pairs.back().second;
  };
  for (size_t i = begin; i < stack->size(); ++i) {
    IValue& v = (*stack)[i];
    if (v.isTensor()) {
      v = seen(v.toTensor());
    } else if (v.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : v.toTensorVector()) list.push_back(seen(t));
      v = list;
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& t : v.toOptionalTensorVector()) list.push_back(t ? std::optional<Tensor>(seen(*t)) : t);
      v = list;
    } else if (v.isDevice()) {
      v = c10::Device(c10::kCPU);
    }
  }
  TORCH_CHECK(pairs.empty() || strangers.empty(), "pretend GPU: ", name,
              " is given tensors of the GPU and of the host: ", c10::Join(", ", strangers));
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  auto back = [&](const Tensor& t) {
    if (!t.defined()) return t;
    for (auto& [mine, theirs] : pairs) {
      if (t.is_same(theirs)) return mine;
    }
    for (auto& [mine, theirs] : pairs) {
      if (t.numel() && t.storage().nbytes() && t.storage().data() == mine.storage().data()) {
        auto out = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(mine.storage()), c10::DispatchKeySet(c10::DispatchKey::CUDA), t.dtype());
        out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
        return out;
      }
    }
    return new_on_gpu(t);
  };
  for (auto& [mine, theirs] : pairs) {  // out= that was given another shape
    if (theirs.sizes() != mine.sizes() || theirs.strides() != mine.strides()) {
      if (theirs.storage().nbytes() > mine.storage().nbytes()) {
        auto fresh = new_on_gpu(theirs);
        mine.unsafeGetTensorImpl()->set_storage_keep_dtype(fresh.storage());
        mine.unsafeGetTensorImpl()->set_sizes_and_strides(fresh.sizes(), fresh.strides(), fresh.storage_offset());
      } else {
        mine.unsafeGetTensorImpl()->set_sizes_and_strides(theirs.sizes(), theirs.strides(), theirs.storage_offset());
      }
    }
  }
  const size_t results = schema.returns().size();
  for (size_t i = stack->size() - results; i < stack->size(); ++i) {
    IValue& v = (*stack)[i];
    if (v.isTensor()) {
      v = back(v.toTensor());
    } else if (v.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : v.toTensorVector()) list.push_back(back(t));
      v = list;
    }
  }
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                     std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>, std::optional<c10::Device>,
             std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  run(to_gpu);
  const Tensor to = on_cpu(self), source = on_cpu(from);
  if (non_blocking && self.is_cuda() != from.is_cuda() && (self.is_cuda() ? from : self).is_pinned()) {
    std::lock_guard<std::mutex> lock(waiting);
    if (self.is_cuda()) {
      to_gpu.push_back([self, to, from] { to.copy_(from); });
    } else {
      to_host.push_back([to = self, source = source.clone()] { to.copy_(source); });
    }
    return self;
  }
  if (self.is_cuda() != from.is_cuda()) synchronize();
  to.copy_(source);
  return self;
}

Tensor as_strided(const Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

const Tensor& resize_(const Tensor& self, c10::IntArrayRef size, std::optional<c10::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  if (self.sizes() == size) return self;
  impl->set_sizes_contiguous(size);
  const size_t needed = (impl->storage_offset() + impl->numel()) * self.itemsize();
  if (needed > self.storage().nbytes()) {
    auto fresh = memory.allocate(needed);
    std::memcpy(fresh.get(), self.storage().data(), self.storage().nbytes());
    impl->unsafe_storage().unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
    impl->unsafe_storage().unsafeGetStorageImpl()->set_nbytes(needed);
  }
  return self;
}

Tensor& set_storage(Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

// Flash attention, by the CPU's: queries q [B,H,L,D] aligned to the end of the keys k and v [B,K,S,D]; what it keeps is out and one number a query.
struct Flash {
  Tensor q, k, v;
  std::optional<Tensor> mask;
  int64_t shared;  // query heads to a key head
  bool causal;
  Flash(const Tensor& query, const Tensor& key, const Tensor& value, bool is_causal) : q(on_cpu(query)), shared(query.size(1) / key.size(1)) {
    k = on_cpu(key).repeat_interleave(shared, 1);
    v = on_cpu(value).repeat_interleave(shared, 1);
    causal = is_causal && q.size(2) == k.size(2);
    if (is_causal && !causal) {
      const auto above = at::ones({q.size(2), k.size(2)}, at::kBool).triu(k.size(2) - q.size(2) + 1);
      mask = at::zeros({q.size(2), k.size(2)}, q.options()).masked_fill_(above, -std::numeric_limits<double>::infinity());
    }
  }
  Tensor by_key_head(const Tensor& t) const {
    return shared == 1 ? t : t.view({t.size(0), -1, shared, t.size(2), t.size(3)}).sum(2);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> flash(
    const Tensor& q, const Tensor& k, const Tensor& v, double, bool is_causal, bool, std::optional<double> scale) {
  run(to_gpu);
  Flash f(q, k, v, is_causal);
  auto [out, sums] = at::_scaled_dot_product_flash_attention_for_cpu(f.q, f.k, f.v, 0.0, f.causal, f.mask, scale);
  auto none = new_on_gpu(at::empty({0}));
  return {new_on_gpu(out), new_on_gpu(sums), Tensor(), Tensor(), q.sym_size(2), k.sym_size(2), none, none, none};
}

std::tuple<Tensor, Tensor, Tensor> flash_back(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& sums, const Tensor&, const Tensor&,
    c10::SymInt, c10::SymInt, double, bool is_causal, const Tensor&, const Tensor&, std::optional<double> scale) {
  run(to_gpu);
  Flash f(q, k, v, is_causal);
  auto [to_q, to_k, to_v] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      on_cpu(grad), f.q, f.k, f.v, on_cpu(out), on_cpu(sums), 0.0, f.causal, f.mask, scale);
  return {new_on_gpu(to_q), new_on_gpu(f.by_key_head(to_k)), new_on_gpu(f.by_key_head(to_v))};
}

int64_t choose_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, double dropout, bool, std::optional<double>, bool) {
  const bool flash = q.dim() == 4 && !mask && dropout == 0.0;
  return int64_t(flash ? at::SDPBackend::flash_attention : at::SDPBackend::math);
}

// RMSNorm in one kernel: what it keeps is its input and one number a row
std::tuple<Tensor, Tensor> norm(const Tensor& x, c10::IntArrayRef shape, const std::optional<Tensor>& weight, std::optional<double> eps) {
  run(to_gpu);
  const Tensor wide = on_cpu(x).to(at::kFloat);
  const Tensor scale = (wide.square().mean(-1, true) + eps.value_or(std::numeric_limits<float>::epsilon())).rsqrt();
  Tensor out = wide * scale;
  if (weight) out = out * on_cpu(*weight);
  return {new_on_gpu(out.to(x.scalar_type())), new_on_gpu(scale)};
}

std::tuple<Tensor, Tensor> norm_back(const Tensor& grad, const Tensor& x, c10::IntArrayRef shape, const Tensor& scale,
                                     const std::optional<Tensor>& weight, std::array<bool, 2>) {
  run(to_gpu);
  const Tensor even = on_cpu(x).to(at::kFloat) * on_cpu(scale), to = on_cpu(grad).to(at::kFloat);
  const Tensor by_even = weight ? to * on_cpu(*weight) : to;
  const Tensor to_x = on_cpu(scale) * (by_even - even * (by_even * even).mean(-1, true));
  const Tensor to_weight = weight ? (to * even).flatten(0, -2).sum(0).to(weight->scalar_type()) : Tensor();
  return {new_on_gpu(to_x.to(x.scalar_type())), new_on_gpu(to_weight)};
}

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> lock(pinning);
    return pinned.count(data) > 0;
  }
  int getNumGPUs() const override { return 1; }
};

}  // namespace

using PretendHooks = Hooks;
namespace at {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", ::PretendHooks);
}

namespace {
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("as_strided", &as_strided);
  m.impl("view", [](const Tensor& t, c10::IntArrayRef s) { return at::native::view(t, s); });
  m.impl("_reshape_alias", [](const Tensor& t, c10::IntArrayRef s, c10::IntArrayRef r) { return at::native::_reshape_alias(t, s, r); });
  m.impl("unfold", [](const Tensor& t, int64_t d, int64_t s, int64_t p) { return at::native::unfold(t, d, s, p); });
  m.impl("mm.dtype", [](const Tensor& a, const Tensor& b, c10::ScalarType t) { return at::mm(a.to(t), b.to(t)); });
  m.impl("_scaled_dot_product_flash_attention", &flash);
  m.impl("_scaled_dot_product_flash_attention_backward", &flash_back);
  m.impl("_fused_rms_norm", &norm);
  m.impl("_fused_rms_norm_backward", &norm_back);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
}

void resize_storage(const Tensor& t, int64_t nbytes) {
  auto* storage = t.storage().unsafeGetStorageImpl();
  auto fresh = memory.allocate(nbytes);
  if (nbytes && storage->nbytes()) std::memcpy(fresh.get(), storage->data(), std::min<size_t>(nbytes, storage->nbytes()));
  storage->set_data_ptr_noswap(std::move(fresh));
  storage->set_nbytes(nbytes);
}

struct Mapping {
  void* data;
  size_t nbytes;
  int file;
};

void unmap(void* context) {
  auto* mapping = static_cast<Mapping*>(context);
  munmap(mapping->data, mapping->nbytes);
  close(mapping->file);
  in_use -= mapping->nbytes;
  delete mapping;
}

c10::DataPtr mapped(int file, size_t nbytes) {
  void* data = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  TORCH_CHECK(data != MAP_FAILED, "pretend GPU: mmap: ", strerror(errno));
  in_use += nbytes;
  return {data, new Mapping{data, nbytes, file}, &unmap, GPU};
}

// The memory of `t` moves to a file without a name, which other processes can open; returns its number
int64_t share(const Tensor& t) {
  auto* storage = t.storage().unsafeGetStorageImpl();
  int file = memfd_create("pretend-gpu", MFD_CLOEXEC);
  TORCH_CHECK(file >= 0 && ftruncate(file, storage->nbytes()) == 0, "pretend GPU: memfd: ", strerror(errno));
  auto fresh = mapped(file, storage->nbytes());
  std::memcpy(fresh.get(), storage->data(), storage->nbytes());
  storage->set_data_ptr_noswap(std::move(fresh));
  return file;
}

Tensor open_shared(std::string name, int64_t nbytes) {
  int file = open(name.c_str(), O_RDWR | O_CLOEXEC);
  TORCH_CHECK(file >= 0, "pretend GPU: ", name, ": ", strerror(errno));
  auto out = empty({0}, at::kByte, std::nullopt, std::nullopt, std::nullopt, std::nullopt);
  auto* storage = out.storage().unsafeGetStorageImpl();
  storage->set_data_ptr_noswap(mapped(file, nbytes));
  storage->set_nbytes(nbytes);
  return out;
}

const bool registered = (c10::SetAllocator(c10::kCUDA, &memory), at::detail::getCUDAHooks().isBuilt());
const bool chosen = (at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention), true);

TORCH_LIBRARY(pretend_gpu, m) {
  m.def("synchronize", &synchronize);
  m.def("in_use", [] { return in_use.load(); });
  m.def("peak", [] { return peak.load(); });
  m.def("limit", [](int64_t nbytes) { limit = nbytes; });
  m.def("forget_peak", [] { peak = in_use.load(); });
  m.def("resize_storage", &resize_storage);
  m.def("share", &share);
  m.def("open_shared", &open_shared);
  m.def("host_view", &on_cpu);
}
