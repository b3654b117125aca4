//! The program blkholefs. All of it is in the library, where tests reach it.

use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    blkholefs::run(&std::env::args_os().collect::<Vec<OsString>>())
}
