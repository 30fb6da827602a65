#include "cuda/cublaslt.h"

#include <memory>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

#include "core/error.h"
#include "cuda/cublaslt_plan.h"
#include "cuda/product_trial.h"

namespace vt::cuda {
namespace {

using namespace cublaslt;

// Of a thread. Each takes some hundred bytes of ours and of the library's.
constexpr size_t kMostPlans = 4096;

/// The products that were planned, of all threads. Never destroyed, as threads may outlive statics.
struct Seen {
  std::mutex mutex;
  std::unordered_set<Key, KeyHash> keys;
};
Seen& seen() {
  static auto* const instance = new Seen;
  return *instance;
}
void remember(const Key& key) {
  const std::lock_guard lock(seen().mutex);
  if (seen().keys.size() < kMostPlans) seen().keys.insert(key);
}

/// Plans of a thread, so that no lock is taken and the bias pointer of a descriptor is not shared.
struct Plans {
  std::unordered_map<Key, std::unique_ptr<Plan>, KeyHash> made;
  uint32_t version = 0;  // of the measured products that they were chosen by

  Plan& of(const Key& key, const Float8Operands& float8) {
    if (const uint32_t now = measured_products_version(); version != now) [[unlikely]] {
      made.clear();
      version = now;
    }
    const auto found = made.find(key);
    if (found != made.end()) [[likely]]
      return *found->second;
    auto plan = std::make_unique<Plan>();
    describe(*plan, key, float8);
    choose(*plan, key);
    if (made.size() >= kMostPlans) made.clear();  // of shapes that change without end
    if (plan->usable && may_have_rows(key)) remember(key);
    return *made.emplace(key, std::move(plan)).first->second;
  }
};

}  // namespace

int64_t cublaslt_version() { return static_cast<int64_t>(api().version()); }

bool cublaslt_gemm(const GemmProblem& p, Stream stream) {
  thread_local Plans plans;
  const Plan& plan = plans.of(key_of(p, stream.device), p.float8);
  if (!plan.usable) return false;
  issue(plan, p, stream);
  return true;
}

std::vector<SeenProduct> seen_products() {
  std::vector<SeenProduct> out;
  const std::lock_guard lock(seen().mutex);
  for (const Key& k : seen().keys)
    out.push_back({signature_of(k), k.lda, k.ldb, k.ldc, k.step_a, k.step_b, k.step_c, k.alignment,
                   k.device});
  return out;
}

struct ProductTrial::Made {
  Plan plan;
  std::vector<Answer> answers;
};

ProductTrial::ProductTrial(const GemmProblem& problem, int device)
    : problem_(problem), device_(device), made_(std::make_unique<Made>()) {
  const Key key = key_of(problem, device);
  check(may_have_rows(key), "answers are measured of products of floats of 16 bits or more");
  describe(made_->plan, key, problem.float8);
  Answer first;
  check(first_answer(made_->plan, key, first), "cuBLASLt has no algorithm for ",
        vt::cuda::describe(signature_of(key)));
  check(configuration_of(first.algorithm, first.configuration),
        "cuBLASLt does not tell the configuration of its answer");
  made_->answers.push_back(first);
  for (const Answer& answer : answers_of(made_->plan, key)) {
    if (answer.configuration != first.configuration) made_->answers.push_back(answer);
  }
}
ProductTrial::~ProductTrial() = default;

size_t ProductTrial::answers() const { return made_->answers.size(); }
const AlgorithmConfiguration& ProductTrial::configuration(size_t answer) const {
  return made_->answers.at(answer).configuration;
}
size_t ProductTrial::workspace(size_t answer) const { return made_->answers.at(answer).workspace; }

void ProductTrial::run(size_t answer, cudaStream_t stream) {
  const Answer& chosen = made_->answers.at(answer);
  made_->plan.algorithm = chosen.algorithm;
  made_->plan.workspace = chosen.workspace;
  issue(made_->plan, problem_, {stream, device_});
}

}  // namespace vt::cuda
