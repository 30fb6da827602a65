// Elementwise math for kernels: vexp(x), vlog(x), … for float and double. See the parts for
// accuracy and method; tests/cpp/test_vec_math.cpp measures each against the C library.
#pragma once

#include "cpu/kernels/vec_math_activation.h"
#include "cpu/kernels/vec_math_erf.h"
#include "cpu/kernels/vec_math_exp.h"
#include "cpu/kernels/vec_math_trig.h"
