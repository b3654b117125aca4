//! The end of a device whose size is no multiple of its sectors, on a kernel that can read it.

#[test]
#[ignore = "needs another kernel: run tests/run"]
fn a_partial_last_sector_is_data() {
    crate::common::tail::a_partial_last_sector_is_data();
}
