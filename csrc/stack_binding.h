// The binding of the step of a whole model.
#pragma once

#include <nanobind/nanobind.h>

#include "stack.h"

namespace anymamba {

using RunStep = void (*)(Stack&, const StackStep&);
using RunReplay = void (*)(const Stack&, const StackReplay&);

// Both call the kernel of the chosen instruction set.
void bind_stack(nanobind::module_& m, RunStep step, RunReplay replay);

}  // namespace anymamba
