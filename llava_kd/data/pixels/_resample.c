/* `llava_kd.data.pixels._resample`: the kernels of resample.h for Python. Every size is checked here, before the
 * interpreter is released and a kernel runs. Only the stable interface of Python is used, for setup.py to build
 * one file for all versions.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "resample.h"

static const int64_t MOST = 1 << 24; /* of a length, an output and a count of taps */

static int refuse(const char *what)
{
    PyErr_SetString(PyExc_ValueError, what);
    return -1;
}

static int read_axis(const Py_buffer *first, const Py_buffer *weights, int64_t length, Axis *axis)
{
    const int64_t out = first->len / (int64_t)sizeof(int32_t);
    if (length < 1 || length > MOST || out < 1 || out > MOST || first->len % (int64_t)sizeof(int32_t))
        return refuse("an axis must have from 1 to 2^24 inputs and outputs, the first input of each as an int32");
    const int64_t row = out * 4 * (int64_t)sizeof(int32_t);
    if (weights->len < row || weights->len % row || weights->len / row > MOST / 4)
        return refuse("the weights of an axis must be int32 [outputs, taps], with taps a multiple of 4, up to 2^24");
    *axis = (Axis){length, out, weights->len / row * 4, first->buf, weights->buf};
    if ((uintptr_t)first->buf % sizeof(int32_t) || (uintptr_t)weights->buf % sizeof(int32_t))
        return refuse("the first inputs and the weights of an axis must be aligned as int32");
    if (!resample_axis_fits(axis))
        return refuse("an axis must read its own inputs, in rising order, with weights that cannot overflow");
    return 0;
}

static const Kernel *find_kernel(const char *name)
{
    for (int i = 0; i < NUM_KERNELS; i++)
        if (!strcmp(KERNELS[i].name, name) && kernel_runs_here(&KERNELS[i]))
            return &KERNELS[i];
    refuse("no such kernel runs here; kernels() names those that do");
    return NULL;
}

PyDoc_STRVAR(kernels_doc, "kernels()\n--\n\nNames of the kernels that run on this CPU, the quickest first.");

static PyObject *kernels(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    PyObject *names = PyList_New(0);
    for (int i = 0; names && i < NUM_KERNELS; i++) {
        if (!kernel_runs_here(&KERNELS[i]))
            continue;
        PyObject *name = PyUnicode_FromString(KERNELS[i].name);
        if (!name || PyList_Append(names, name))
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

PyDoc_STRVAR(resize_doc,
    "resize(kernel, pixels, height, width, rows_first, rows_weights, columns_first, columns_weights, out)\n--\n\n"
    "Resize contiguous uint8 [height, width, 3] into `out`, uint8 [rows, columns, 3]: columns first, then rows.\n\n"
    "For either axis int32 [outputs] of the first inputs and int32 [outputs, taps] of weights in units of 2^-22.");

static PyObject *resize(PyObject *self, PyObject *arguments)
{
    (void)self;
    const char *name;
    long long height, width;
    Py_buffer pixels, rows_first, rows_weights, columns_first, columns_weights, out;
    if (!PyArg_ParseTuple(arguments, "sy*LLy*y*y*y*w*:resize", &name, &pixels, &height, &width, &rows_first,
                          &rows_weights, &columns_first, &columns_weights, &out))
        return NULL;
    Axis rows, columns;
    int status = -1;
    const Kernel *kernel = find_kernel(name);
    if (!kernel || read_axis(&rows_first, &rows_weights, height, &rows)
        || read_axis(&columns_first, &columns_weights, width, &columns))
        goto end;
    if (pixels.len != CHANNELS * rows.length * columns.length || out.len != CHANNELS * rows.out * columns.out) {
        refuse("pixels must be uint8 [height, width, 3], and out uint8 [rows, columns, 3]");
        goto end;
    }
    Py_BEGIN_ALLOW_THREADS
    status = resample(kernel, pixels.buf, &rows, &columns, out.buf);
    Py_END_ALLOW_THREADS
    if (status)
        PyErr_NoMemory();
end:
    PyBuffer_Release(&pixels);
    PyBuffer_Release(&rows_first);
    PyBuffer_Release(&rows_weights);
    PyBuffer_Release(&columns_first);
    PyBuffer_Release(&columns_weights);
    PyBuffer_Release(&out);
    if (status)
        return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(look_up_doc,
    "look_up(pixels, plane, table, out)\n--\n\n"
    "Look each value of uint8 [images, plane, 3] up in float32 [3, 256], into `out`, float32 [images, 3, plane].");

static PyObject *look_up_values(PyObject *self, PyObject *arguments)
{
    (void)self;
    long long plane;
    Py_buffer pixels, table, out;
    if (!PyArg_ParseTuple(arguments, "y*Ly*w*:look_up", &pixels, &plane, &table, &out))
        return NULL;
    const int64_t value = sizeof(float);
    int is_right = plane >= 1 && plane <= MOST * MOST && pixels.len % (CHANNELS * plane) == 0
        && table.len == CHANNELS * 256 * value && out.len % value == 0 && out.len / value == pixels.len
        && (uintptr_t)table.buf % sizeof(float) == 0 && (uintptr_t)out.buf % sizeof(float) == 0;
    if (is_right) {
        Py_BEGIN_ALLOW_THREADS
        look_up(pixels.buf, pixels.len / (CHANNELS * plane), plane, table.buf, out.buf);
        Py_END_ALLOW_THREADS
    } else {
        refuse("pixels must be uint8 [images, plane, 3], table float32 [3, 256], out float32 [images, 3, plane]");
    }
    PyBuffer_Release(&pixels);
    PyBuffer_Release(&table);
    PyBuffer_Release(&out);
    if (!is_right)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"kernels", kernels, METH_NOARGS, kernels_doc},
    {"resize", resize, METH_VARARGS, resize_doc},
    {"look_up", look_up_values, METH_VARARGS, look_up_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_resample", "Resize and normalisation of 8-bit RGB in C.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__resample(void)
{
    return PyModule_Create(&module);
}
