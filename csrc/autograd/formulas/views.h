// Used by the backward formulas of view ops.
#pragma once

#include "autograd/view_nodes.h"
#include "core/view_geometry.h"
