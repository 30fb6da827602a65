// The complete AutogradMeta, for those that own or read it.
#pragma once

#include "autograd/node.h"
