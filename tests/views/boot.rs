//! A virtual machine boots from a disk whose backing file is a compact image.

use std::os::unix::fs::FileExt as _;

use super::view;
use crate::common::image::{Image, open_for_writing};
use crate::common::mount::Mount;
use crate::common::nbd::directory;
use crate::common::{MIB, needs, run};

/// A boot sector: it has the BIOS read the sector at 20 MiB (INT 13h, function 42h), writes the text in it to the serial port, and
/// switches QEMU's machine `pc` off (its ACPI port 604h).
const BOOT: [u8; 52] = [
    0x31, 0xC0, // xor ax, ax
    0x8E, 0xD8, // mov ds, ax
    0xBE, 0x24, 0x7C, // mov si, packet
    0xB4, 0x42, // mov ah, 42h
    0xCD, 0x13, // int 13h
    0xBE, 0x00, 0x80, // mov si, 8000h
    0xFC, // cld
    0xAC, // next: lodsb
    0x08, 0xC0, // or al, al
    0x74, 0x06, // jz off
    0xBA, 0xF8, 0x03, // mov dx, 3F8h
    0xEE, // out dx, al
    0xEB, 0xF5, // jmp next
    0xBA, 0x04, 0x06, // off: mov dx, 604h
    0xB8, 0x00, 0x20, // mov ax, 2000h
    0xEF, // out dx, ax
    0xF4, // hlt
    0xEB, 0xFD, // jmp to the hlt
    // packet: its size, one sector to 0000:8000h, from sector 40960 on
    0x10, 0x00, 0x01, 0x00, 0x00, 0x80, 0x00, 0x00, 0x00, 0xA0, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
];
const TEXT: &str = "read from the sector at 20 MiB";

#[test]
fn a_virtual_machine_boots_from_an_image() {
    needs!(root, programs["qemu-img", "qemu-system-x86_64"]);
    let disk = Image::new(64 * MIB);
    let file = open_for_writing(disk.path());
    file.write_all_at(&BOOT, 0).unwrap();
    file.write_all_at(&[0x55, 0xAA], 510).unwrap();
    file.write_all_at(TEXT.as_bytes(), 20 * MIB).unwrap();
    drop(file);
    let mount = Mount::with_options(disk.path(), &["-o", "compact"]);
    let directory = directory();
    let overlay = directory.path().join("overlay.qcow2").into_os_string().into_string().unwrap();
    let backing = view(&mount, ".qcow2");
    run("qemu-img", ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing.to_str().unwrap(), &overlay]);
    let drive = format!("file={overlay},format=qcow2");
    let machine = ["-M", "pc", "-m", "64", "-display", "none", "-serial", "stdio", "-no-reboot", "-drive", &drive];
    let words = ["60", "qemu-system-x86_64"].into_iter().chain(machine);
    assert_eq!(run("timeout", words), TEXT);
}
