// Pointers as properties of a bound class: in Python a pointer is an integer, and 0 is a null pointer.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

namespace anymamba {

template <typename Args, typename Value>
void bind_pointer(nanobind::class_<Args>& type, const char* name, Value* Args::* member) {
    type.def_prop_rw(
        name, [member](const Args& a) { return reinterpret_cast<uintptr_t>(a.*member); },
        [member](Args& a, uintptr_t address) { a.*member = reinterpret_cast<Value*>(address); });
}

}  // namespace anymamba
