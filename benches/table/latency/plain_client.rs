//! The least that an NBD client can do: one connection, and one read after another.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Values of the protocol's document (doc/proto.md of nbd).
const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const EXPORT_NAME: u32 = 1;
/// `NBD_FLAG_C_FIXED_NEWSTYLE` and `NBD_FLAG_C_NO_ZEROES`.
const CLIENT_FLAGS: u32 = 3;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: [u8; 4] = [0x67, 0x44, 0x66, 0x98];

/// A connection to the default export of a server.
pub struct PlainClient(UnixStream);

impl PlainClient {
    /// Connects, and chooses the export.
    pub fn new(socket: &Path) -> Self {
        let mut stream = UnixStream::connect(socket).expect("the server listens");
        // Two magic numbers and the server's flags.
        stream.read_exact(&mut [0; 18]).expect("a greeting");
        let hello = [&CLIENT_FLAGS.to_be_bytes()[..], OPTION_MAGIC, &EXPORT_NAME.to_be_bytes(), &[0; 4]].concat();
        stream.write_all(&hello).expect("the server listens");
        // The size of the export, and its flags.
        stream.read_exact(&mut [0; 10]).expect("the export");
        Self(stream)
    }

    /// Reads from this offset.
    pub fn read(&mut self, buffer: &mut [u8], offset: u64) {
        let length = u32::try_from(buffer.len()).expect("small").to_be_bytes();
        let flags_type_and_cookie = [0; 12];
        let request =
            [&REQUEST_MAGIC.to_be_bytes()[..], &flags_type_and_cookie, &offset.to_be_bytes(), &length].concat();
        self.0.write_all(&request).expect("the server listens");
        let mut reply = [0; 16];
        self.0.read_exact(&mut reply).expect("a reply");
        assert_eq!((&reply[..4], &reply[4..8]), (&REPLY_MAGIC[..], &[0; 4][..]), "a simple reply without an error");
        self.0.read_exact(buffer).expect("the bytes");
    }
}
