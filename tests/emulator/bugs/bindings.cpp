// The Python face of the honesty cases: names(), run(name).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "bugs/cases.h"

namespace honesty {

namespace {

std::map<std::string, Case>& cases() {
  static std::map<std::string, Case> all;
  return all;
}

}  // namespace

Register::Register(const char* name, Case run) { cases()[name] = run; }

PYBIND11_MODULE(_honesty, m) {
  m.doc() = "Kernels that test the emulator.";
  m.def("names", [] {
    std::vector<std::string> names;
    for (const auto& entry : cases()) names.push_back(entry.first);
    return names;
  });
  m.def("run", [](const std::string& name) { cases().at(name)(); }, pybind11::arg("name"));
  pybind11::register_exception<WrongResult>(m, "WrongResult", PyExc_AssertionError);
}

}  // namespace honesty
