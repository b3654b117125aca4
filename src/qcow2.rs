//! Virtual qcow2 images: where each byte of an image comes from, without storing the image.
//!
//! Pure: no devices and no files. The format is that of QEMU, `docs/interop/qcow2.rst`, version 3.
