// Makes the search an importable extension module; Python reaches it through ctypes.
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "quant_methods._cpu", "Compiled searches, reached through ctypes.", -1, NULL, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__cpu(void) { return PyModule_Create(&module); }
