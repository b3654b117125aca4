//! A whole session with an NBD server: greeting, options, and the replies to reads and block status requests.
//!
//! Invariant: for all bytes that the server may send, each call of the client returns an error or an answer, without a panic
//! and in bounded memory. The client does not wait for a server that has closed the connection. A read returns all requested
//! bytes that lie within the export. The runs of the map have increasing ends, and end within the export.
//!
//! An input is what the server sends on each connection. It does not depend on the requests.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use blkholefs::testing::source::Context;
use blkholefs::testing::source::nbd::{Client, Timeouts, Uri, layer};
use blkholefs::testing::units::Bytes;

/// The longest time for a session: far more than one takes that does not wait.
const LONGEST: Duration = Duration::from_secs(10);

/// What the server sends on the next connection.
static SENT: Mutex<Vec<u8>> = Mutex::new(Vec::new());
/// The address of the server, which runs until the process ends.
static SERVER: LazyLock<Uri> = LazyLock::new(|| {
    let name = format!("blkholefs-fuzz-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).expect("a short name");
    let listener = UnixListener::bind_addr(&address).expect("an unused name");
    std::thread::spawn(move || {
        for mut socket in listener.incoming().map_while(Result::ok) {
            let bytes = SENT.lock().unwrap_or_else(PoisonError::into_inner).clone();
            // The client may close the connection before it has received everything.
            let _ = socket.write_all(&bytes).and_then(|()| socket.shutdown(Shutdown::Write));
            let _ = socket.read_to_end(&mut Vec::new());
        }
    });
    Uri::parse(&format!("nbd+unix:///export?socket=%00{name}")).expect("a URI")
});

pub fn run(input: &[u8]) {
    *SENT.lock().unwrap_or_else(PoisonError::into_inner) = input.to_vec();
    let begin = Instant::now();
    session();
    assert!(begin.elapsed() < LONGEST, "the session took {:?}", begin.elapsed());
}

fn session() {
    let patience = Timeouts { connect: LONGEST, request: LONGEST, outage: Duration::ZERO, ..Timeouts::default() };
    let Ok(client) = Client::open_with_timeouts(&SERVER, patience) else { return };
    let client = Arc::new(client);
    let (size, block) = (client.size(), client.minimum_block());
    assert!(block.get().is_power_of_two() && i64::try_from(size.get()).is_ok());
    let map = layer(client.clone(), &Context::default()).map;
    assert_eq!(map.len(), size);
    let mut at = Bytes::ZERO;
    for _ in 0..3 {
        if at < size {
            let run = map.extent_at(at);
            assert!(at < run.end && run.end <= size);
            at = run.end;
        }
    }
    for offset in [Bytes::ZERO, Bytes::new(1000), size.saturating_sub(Bytes::new(100))] {
        let mut buffer = [0; 600];
        if let Ok(count) = client.read_at(&mut buffer, offset) {
            assert_eq!(count as u64, size.saturating_sub(offset).get().min(600));
        }
    }
}
