//! The identity of the present boot.

use std::fs;
use std::sync::OnceLock;

/// The random number that the kernel has chosen for this boot (`drivers/char/random.c: proc_do_uuid`). No two boots have the
/// same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootId(u128);

impl BootId {
    /// The number of this boot. `None` if proc does not show it.
    pub fn current() -> Option<Self> {
        static CURRENT: OnceLock<Option<BootId>> = OnceLock::new();
        *CURRENT.get_or_init(|| Self::parse(&fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?))
    }

    /// Parses a UUID.
    pub fn parse(text: &str) -> Option<Self> {
        let digits: String = text.trim_ascii().split('-').collect();
        let is_hex = digits.len() == 32 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_hex.then(|| u128::from_str_radix(&digits, 16).ok().map(Self))?
    }

    /// The number.
    pub fn get(self) -> u128 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_id_is_a_uuid() {
        let id = BootId::parse("0b1c2d3e-0000-4000-8000-0123456789ab\n").unwrap();
        assert_eq!(id.get(), 0x0b1c_2d3e_0000_4000_8000_0123_4567_89ab);
        for text in
            ["", "x", "0b1c2d3e", "+b1c2d3e-0000-4000-8000-0123456789ab", "0b1c2d3e-0000-4000-8000-0123456789ab0"]
        {
            assert_eq!(BootId::parse(text), None, "{text:?}");
        }
        assert_eq!(BootId::current(), BootId::current());
    }
}
