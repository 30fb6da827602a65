// CuTe kernels that come while the program runs: from a shared library that holds the objects of
// one op of the user's, or of one variant that was not linked in (cute_kernels/objects.py makes
// them).
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "cuda/cute/launch_table.h"
#include "cuda/cute/packing.h"

namespace vt::cuda::cute {

/// The functions of one compiled variant.
struct OpenedCode {
  Entry entry;
  Module::Step init, load;
};

/// From a shared library, which stays loaded. Throws where it cannot be loaded or lacks a symbol.
OpenedCode open_code(const std::string& library, const std::string& entry, const std::string& init,
                     const std::string& load);

/// A variant as the user's contract has it.
struct LoadedVariant {
  std::string name;
  std::vector<ExtentRule> extents;
  std::vector<TensorRule> tensors;
  OpenedCode code;
  Module module;
};

/// The variants of one kernel. The library's own are in the generated table; these are the user's.
class LoadedKernel {
 public:
  LoadedKernel(std::string name, std::vector<std::string> extents, std::vector<std::string> tensors,
               std::vector<ScalarType> scalars);
  LoadedKernel(const LoadedKernel&) = delete;
  LoadedKernel& operator=(const LoadedKernel&) = delete;

  /// Appends a variant, which is asked after those before it. It throws where its rules do not
  /// match the kernel's names. Not while another thread launches.
  void add(std::string name, std::vector<ExtentRule> extents, std::vector<TensorRule> tensors,
           OpenedCode code);
  /// The first variant that applies is launched: returns its name. Otherwise `why` says why none
  /// was, and nothing was launched. A launch that fails throws.
  const char* launch(const Call& call, const Launch& on, std::string& why);

  const std::string& name() const { return name_; }
  size_t extents() const { return extents_.size(); }
  size_t tensors() const { return tensors_.size(); }
  std::span<const ScalarType> scalars() const { return scalars_; }

 private:
  std::string refusal(const LoadedVariant& variant, Refusal refusal, const Call& call) const;

  std::string name_;
  std::vector<std::string> extents_, tensors_;
  std::vector<const char*> extent_names_, tensor_names_;
  std::vector<ScalarType> scalars_;
  std::deque<LoadedVariant> variants_;
};

}  // namespace vt::cuda::cute
