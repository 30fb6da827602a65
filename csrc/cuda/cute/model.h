// A model of matrix products for shapes that no measured row covers: cute_kernels/model.py says how
// it works and fits its weights, which the generated table holds. Needs no CUDA.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <span>

namespace vt::cuda::cute {

/// l, m, n, k.
using ProductShape = std::array<int64_t, 4>;

/// A measured shape, with the number of the fastest variant and both times in microseconds; -1: the
/// library's kernel was not slower.
struct MeasuredPoint {
  ProductShape at;
  int variant;
  double us, library_us;
};

/// A variant's tile, its step along k, and the blocks of its clusters down and across.
struct Tile {
  int m = 0, n = 0, k = 0, down = 1, across = 1;
};

struct ProductModel {
  static constexpr int kTerms = 4, kNeighbours = 3, kVotes = 2;
  static constexpr double kReach = 2;
  static constexpr double kMargin = 0.10, kMarginElsewhere = 0.20;

  std::span<const MeasuredPoint> points;  // none: there is no model
  std::span<const Tile> tiles;            // by variant
  std::array<double, kTerms> weights, library_weights;
  int multiprocessors;  // of the GPU that was measured
  int gpu;              // its number among tuned_gpus()

  struct Prediction {
    int variant = -1;  // -1: the library's kernel
    double gain = 0;   // by which fraction the variant is faster
  };
  Prediction predict(const ProductShape& at, int multiprocessors_here, double margin) const;

 private:
  using Terms = std::array<double, kTerms>;

  static double distance(const ProductShape& a, const ProductShape& b) {
    double product = 1;
    for (size_t i = 0; i < a.size(); ++i) {
      const auto x = static_cast<double>(a[i]), y = static_cast<double>(b[i]);
      product *= x > y ? x / y : y / x;
    }
    return product;
  }
  static bool within_reach(const ProductShape& a, const ProductShape& b) {
    for (size_t i = 0; i < a.size(); ++i) {
      const auto [low, high] = std::minmax(a[i], b[i]);
      if (static_cast<double>(high) > kReach * static_cast<double>(low)) return false;
    }
    return a[0] == b[0];
  }
  static Terms terms(const Tile& t, const ProductShape& at, int multiprocessors) {
    const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const auto& [l, m, n, k] = at;
    const int64_t clusters = l * up(m, t.m * t.down) * up(n, t.n * t.across);
    const int64_t waves = up(clusters, std::max(1, multiprocessors / (t.down * t.across)));
    const double epilogues = static_cast<double>(waves) * t.m * t.n;
    return {1, epilogues * static_cast<double>(up(k, t.k)) * t.k * 1e-6, epilogues * 1e-4,
            bytes(at) * 1e-6};
  }
  static Terms library_terms(const ProductShape& at, int multiprocessors) {
    const auto results =
        static_cast<double>(at[0]) * static_cast<double>(at[1]) * static_cast<double>(at[2]);
    return {1, results * static_cast<double>(at[3]) / multiprocessors * 1e-7, bytes(at) * 1e-6,
            results * 1e-6};
  }
  static double bytes(const ProductShape& at) {
    const auto l = static_cast<double>(at[0]), m = static_cast<double>(at[1]),
               n = static_cast<double>(at[2]), k = static_cast<double>(at[3]);
    return 2 * l * (m * k + n * k + m * n);
  }
  static double cost(const Terms& weights, const Terms& of) {
    double sum = 0;
    for (size_t i = 0; i < of.size(); ++i) sum += weights[i] * of[i];
    return sum;
  }
};

inline ProductModel::Prediction ProductModel::predict(const ProductShape& at,
                                                      int multiprocessors_here,
                                                      double margin) const {
  // The nearest, in order; of those as far, the one that was measured first.
  std::array<const MeasuredPoint*, kNeighbours> nearest{};
  std::array<double, kNeighbours> far;
  far.fill(INFINITY);
  for (const MeasuredPoint& p : points) {
    const double d = distance(p.at, at);
    if (!(d < far.back())) continue;
    size_t i = kNeighbours - 1;
    for (; i > 0 && far[i - 1] > d; --i) {
      far[i] = far[i - 1];
      nearest[i] = nearest[i - 1];
    }
    far[i] = d;
    nearest[i] = &p;
  }
  int won = 0;
  const MeasuredPoint* near = nullptr;
  for (const MeasuredPoint* p : nearest) {
    if (!p || p->variant < 0) continue;
    ++won;
    if (!near) near = p;
  }
  if (won < kVotes || !within_reach(near->at, at)) return {};
  const Tile& tile = tiles[static_cast<size_t>(near->variant)];
  const double own = near->us * cost(weights, terms(tile, at, multiprocessors_here)) /
                     cost(weights, terms(tile, near->at, multiprocessors));
  const double library = near->library_us *
                         cost(library_weights, library_terms(at, multiprocessors_here)) /
                         cost(library_weights, library_terms(near->at, multiprocessors));
  const double gain = library / own - 1;
  return gain > margin ? Prediction{near->variant, gain} : Prediction{};
}

}  // namespace vt::cuda::cute
