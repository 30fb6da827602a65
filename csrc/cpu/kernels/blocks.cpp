// load_block and store_block: conversion of small blocks between any stored dtype and a kernel's
// compute type. Dense 16-bit floats go through the vectorised converters.
#include "cpu/kernels/convert.h"
#include "cpu/kernels/loops.h"

namespace vt::cpu::VT_ISA {
namespace {

template <class T, class From>
T convert(From x) {
  if constexpr (std::is_same_v<T, bool>)
    return x != From(0);
  else
    return static_cast<T>(x);
}

template <class T, class From>
void load_as(T* out, const char* data, int64_t stride, int64_t n) {
  if (stride == sizeof(From)) {
    const auto* in = reinterpret_cast<const From*>(data);
    for (int64_t i = 0; i < n; ++i) out[i] = convert<T>(in[i]);
    return;
  }
  for (int64_t i = 0; i < n; ++i)
    out[i] = convert<T>(*reinterpret_cast<const From*>(data + i * stride));
}

template <class To, class T>
void store_as(char* data, int64_t stride, const T* in, int64_t n) {
  if (stride == sizeof(To)) {
    auto* out = reinterpret_cast<To*>(data);
    for (int64_t i = 0; i < n; ++i) out[i] = convert<To>(in[i]);
    return;
  }
  for (int64_t i = 0; i < n; ++i) *reinterpret_cast<To*>(data + i * stride) = convert<To>(in[i]);
}

void widen8(float* out, const char* data, int64_t stride, int64_t n, DType from) {
  uint8_t gathered[kBlock];
  const auto* bits = reinterpret_cast<const uint8_t*>(data);
  if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) gathered[i] = bits[i * stride];
    bits = gathered;
  }
  f32_from_float8(out, bits, n, from);
}

void narrow8(char* data, int64_t stride, const float* in, int64_t n, DType to) {
  uint8_t bits[kBlock];
  auto* target = reinterpret_cast<uint8_t*>(data);
  float8_from_f32(stride == 1 ? target : bits, in, n, to);
  if (stride == 1) return;
  for (int64_t i = 0; i < n; ++i) target[i * stride] = bits[i];
}

/// `n` <= kBlock 16-bit or 8-bit values as floats.
void widen(float* out, const char* data, int64_t stride, int64_t n, DType from) {
  if (is_float8(from)) return widen8(out, data, stride, n, from);
  uint16_t gathered[kBlock];
  const auto* bits = reinterpret_cast<const uint16_t*>(data);
  if (stride != 2) {
    for (int64_t i = 0; i < n; ++i)
      gathered[i] = *reinterpret_cast<const uint16_t*>(data + i * stride);
    bits = gathered;
  }
  if (from == DType::BFloat16)
    f32_from_bf16(out, bits, n);
  else
    f32_from_f16(out, bits, n);
}

void narrow(char* data, int64_t stride, const float* in, int64_t n, DType to) {
  if (is_float8(to)) return narrow8(data, stride, in, n, to);
  uint16_t bits[kBlock];
  auto* target = stride == 2 ? reinterpret_cast<uint16_t*>(data) : bits;
  if (to == DType::BFloat16)
    bf16_from_f32(target, in, n);
  else
    f16_from_f32(target, in, n);
  if (stride == 2) return;
  for (int64_t i = 0; i < n; ++i) *reinterpret_cast<uint16_t*>(data + i * stride) = bits[i];
}

template <class T>
void as_floats(float* out, const T* in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(in[i]);
}

}  // namespace

template <class T>
void load_block(T* out, const char* data, int64_t stride, int64_t n, DType from, DType round_to) {
  switch (from) {
    case DType::Bool:
      load_as<T, bool>(out, data, stride, n);
      break;
    case DType::UInt8:
      load_as<T, uint8_t>(out, data, stride, n);
      break;
    case DType::Int8:
      load_as<T, int8_t>(out, data, stride, n);
      break;
    case DType::Int16:
      load_as<T, int16_t>(out, data, stride, n);
      break;
    case DType::Int32:
      load_as<T, int32_t>(out, data, stride, n);
      break;
    case DType::Int64:
      load_as<T, int64_t>(out, data, stride, n);
      break;
    case DType::Float32:
      load_as<T, float>(out, data, stride, n);
      break;
    case DType::Float64:
      load_as<T, double>(out, data, stride, n);
      break;
    case DType::Float16:
    case DType::BFloat16:
    case DType::Float8_e4m3fn:
    case DType::Float8_e5m2:
      if constexpr (std::is_same_v<T, float>) {
        widen(out, data, stride, n, from);
      } else {
        float wide[kBlock];
        for (int64_t i = 0; i < n; i += kBlock) {
          const int64_t m = std::min(kBlock, n - i);
          widen(wide, data + i * stride, stride, m, from);
          for (int64_t k = 0; k < m; ++k) out[i + k] = convert<T>(wide[k]);
        }
      }
      break;
  }
  if constexpr (std::is_same_v<T, float>) {
    // The op's type is a 16-bit float and this operand is stored wider: it takes part as that type.
    if (is_reduced_float(round_to) && from != round_to) {
      uint16_t bits[kBlock];
      if (round_to == DType::BFloat16) {
        bf16_from_f32(bits, out, n);
        f32_from_bf16(out, bits, n);
      } else {
        f16_from_f32(bits, out, n);
        f32_from_f16(out, bits, n);
      }
    }
  }
}

template <class T>
void store_block(char* data, int64_t stride, const T* in, int64_t n, DType to) {
  switch (to) {
    case DType::Bool:
      store_as<bool>(data, stride, in, n);
      break;
    case DType::UInt8:
      store_as<uint8_t>(data, stride, in, n);
      break;
    case DType::Int8:
      store_as<int8_t>(data, stride, in, n);
      break;
    case DType::Int16:
      store_as<int16_t>(data, stride, in, n);
      break;
    case DType::Int32:
      store_as<int32_t>(data, stride, in, n);
      break;
    case DType::Int64:
      store_as<int64_t>(data, stride, in, n);
      break;
    case DType::Float32:
      store_as<float>(data, stride, in, n);
      break;
    case DType::Float64:
      store_as<double>(data, stride, in, n);
      break;
    case DType::Float16:
    case DType::BFloat16:
    case DType::Float8_e4m3fn:
    case DType::Float8_e5m2:
      if constexpr (std::is_same_v<T, float>) {
        narrow(data, stride, in, n, to);
      } else {
        float wide[kBlock];
        as_floats(wide, in, n);
        narrow(data, stride, wide, n, to);
      }
      break;
  }
}

void for_each_as(const TensorIterator& it, std::span<const DType> types, TensorIterator::Loop row,
                 int64_t grain) {
  const int operands = static_cast<int>(types.size());
  bool direct = true;
  for (int k = 0; k < operands; ++k) direct = direct && it.dtype(k) == types[k];
  if (direct) {
    it.for_each(row, grain);
    return;
  }
  it.for_each(
      [&](char** data, const int64_t* strides, int64_t n) {
        alignas(64) char buffers[kMaxOperands][kBlock * 8];
        char* block[kMaxOperands];
        int64_t step[kMaxOperands];
        for (int64_t i = 0; i < n; i += kBlock) {
          const int64_t m = std::min(kBlock, n - i);
          for (int k = 0; k < operands; ++k) {
            const int64_t stride = strides[k];
            char* stored = data[k] + i * stride;
            if (it.dtype(k) == types[k]) {
              block[k] = stored;
              step[k] = stride;
              continue;
            }
            block[k] = buffers[k];
            const bool repeated = k > 0 && stride == 0;
            step[k] = repeated ? 0 : item_size(types[k]);
            if (k == 0) continue;
            visit_all(types[k], [&]<class T>() {
              load_block<T>(reinterpret_cast<T*>(buffers[k]), stored, stride, repeated ? 1 : m,
                            it.dtype(k), it.compute_dtype(k));
            });
          }
          row(block, step, m);
          if (block[0] != buffers[0]) continue;
          visit_all(types[0], [&]<class T>() {
            store_block<T>(data[0] + i * strides[0], strides[0],
                           reinterpret_cast<const T*>(buffers[0]), m, it.dtype(0));
          });
        }
      },
      grain);
}

template void load_block<bool>(bool*, const char*, int64_t, int64_t, DType, DType);
template void load_block<uint8_t>(uint8_t*, const char*, int64_t, int64_t, DType, DType);
template void load_block<int8_t>(int8_t*, const char*, int64_t, int64_t, DType, DType);
template void load_block<int16_t>(int16_t*, const char*, int64_t, int64_t, DType, DType);
template void load_block<int32_t>(int32_t*, const char*, int64_t, int64_t, DType, DType);
template void load_block<int64_t>(int64_t*, const char*, int64_t, int64_t, DType, DType);
template void load_block<float>(float*, const char*, int64_t, int64_t, DType, DType);
template void load_block<double>(double*, const char*, int64_t, int64_t, DType, DType);
template void store_block<bool>(char*, int64_t, const bool*, int64_t, DType);
template void store_block<uint8_t>(char*, int64_t, const uint8_t*, int64_t, DType);
template void store_block<int8_t>(char*, int64_t, const int8_t*, int64_t, DType);
template void store_block<int16_t>(char*, int64_t, const int16_t*, int64_t, DType);
template void store_block<int32_t>(char*, int64_t, const int32_t*, int64_t, DType);
template void store_block<int64_t>(char*, int64_t, const int64_t*, int64_t, DType);
template void store_block<float>(char*, int64_t, const float*, int64_t, DType);
template void store_block<double>(char*, int64_t, const double*, int64_t, DType);

}  // namespace vt::cpu::VT_ISA
