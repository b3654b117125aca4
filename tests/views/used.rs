//! The used space of a device.
