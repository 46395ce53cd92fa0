// Makes the kernels an importable extension module; Python reaches them through ctypes.
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "kv_cache._cpu", "Compiled CPU kernels, reached through ctypes.", -1, NULL, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__cpu(void) { return PyModule_Create(&module); }
