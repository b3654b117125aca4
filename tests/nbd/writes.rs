//! Writes: what is sent to a server, and what its replies mean.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blkholefs::testing::export::{Export, NbdExportFile, Zeroed};
use blkholefs::testing::map::ExtentKind;
use blkholefs::testing::source::nbd::{Client, ExportWriter, NbdExport, Uri};
use blkholefs::testing::sys::buffer::AlignedBuffer;
use blkholefs::testing::units::Bytes;

use crate::fake::{Action, BLOCK, Dialect, FakeServer, Message, Step, failure, set_blocks, set_export};
use crate::{client, default_client, equal_timeouts, read, runs_of};

const DIALECTS: [Dialect; 3] = [Dialect::Simple, Dialect::Structured, Dialect::Extended];
/// The transmission flags `HAS_FLAGS`, `SEND_FLUSH` and `SEND_WRITE_ZEROES`.
const FLAGS: u16 = 0x45;
const LEN: usize = 16 * BLOCK;

pub fn range(start: usize, end: usize) -> Range<Bytes> {
    Bytes::new(start as u64)..Bytes::new(end as u64)
}

/// The errno of a result.
pub fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> Result<T, i32> {
    result.map_err(|error| error.raw_os_error().expect("errors are errnos"))
}

pub fn write(writer: &ExportWriter, at: usize, bytes: &[u8]) -> Result<(), i32> {
    errno(writer.write_at(bytes, Bytes::new(at as u64)))
}

/// A disk without zeros.
pub fn disk() -> Vec<u8> {
    (0..LEN).map(|at| u8::try_from(at % 251 + 1).expect("a byte")).collect()
}

/// A step, the offset, the length and the flags of a request.
type Sent = (Step, usize, usize, u16);

/// A server of [`disk`] with these flags, block sizes and errors, its client, and the requests that it has received, except
/// block status requests.
struct Fixture {
    fake: FakeServer,
    client: Arc<Client>,
    sent: Arc<Mutex<Vec<Sent>>>,
}

impl Fixture {
    /// `error` selects the error of a reply, if it is one.
    fn new(
        dialect: Dialect,
        flags: u16,
        blocks: (u32, u32),
        error: impl Fn(&Message) -> Option<u8> + Send + Sync + 'static,
    ) -> Self {
        let sent = Arc::new(Mutex::new(Vec::new()));
        let recorded = Arc::clone(&sent);
        let hook = move |message: &mut Message| {
            set_export(message, LEN as u64, flags);
            set_blocks(message, blocks.0, blocks.1);
            let step = message.step;
            if matches!(step, Step::Read | Step::Write | Step::WriteZeroes | Step::Flush | Step::Outside) {
                let at = usize::try_from(message.request.offset).unwrap();
                let len = usize::try_from(message.request.len).unwrap();
                recorded.lock().unwrap().push((step, at, len, message.request.flags));
            }
            if let Some(error) = error(message) {
                message.bytes = failure(dialect, message.request.cookie, error);
            }
            Action::Continue
        };
        let fake = FakeServer::new(dialect, &disk(), Arc::new(hook));
        let client = default_client(&fake.uri);
        Self { fake, client, sent }
    }

    fn simple(flags: u16) -> Self {
        Self::new(Dialect::Structured, flags, (1, 1 << 20), |_| None)
    }

    fn writer(&self) -> ExportWriter {
        self.client.writer().expect("the export can be written")
    }

    /// The requests since the last call.
    fn take(&self) -> Vec<Sent> {
        std::mem::take(&mut self.sent.lock().unwrap())
    }
}

#[test]
fn what_is_written_is_on_the_disk_and_is_read_again() {
    for dialect in DIALECTS {
        let fixture = Fixture::new(dialect, FLAGS, (1, 1 << 20), |_| None);
        let writer = fixture.writer();
        let mut model = disk();
        assert_eq!(write(&writer, 3, b"unaligned"), Ok(()));
        model[3..12].copy_from_slice(b"unaligned");
        assert_eq!(write(&writer, LEN - 1, b"e"), Ok(()));
        model[LEN - 1] = b'e';
        assert_eq!(errno(writer.make_zero(&range(BLOCK - 5, 3 * BLOCK))), Ok(true));
        model[BLOCK - 5..3 * BLOCK].fill(0);
        assert_eq!(errno(writer.flush()), Ok(()));
        assert_eq!(*fixture.fake.disk(), model, "{dialect:?}");
        assert_eq!(read(&fixture.client, 0, LEN).as_ref(), Ok(&model), "{dialect:?}");
        let (block, end) = (BLOCK as u64, LEN as u64);
        let holes = [(block, ExtentKind::Data), (3 * block, ExtentKind::Hole), (end, ExtentKind::Data)];
        let expected = if dialect == Dialect::Simple { &holes[2..] } else { &holes };
        assert_eq!(runs_of(&fixture.client), expected, "{dialect:?}");
        let sent = fixture.take();
        assert!(sent.iter().all(|(.., flags)| *flags & 3 == 0), "neither FUA nor NO_HOLE: {sent:?}");
        assert!(sent.contains(&(Step::Flush, 0, 0, 0)), "{sent:?}");
    }
}

#[test]
fn an_export_has_a_writer_unless_it_is_read_only() {
    for (flags, opened) in [(3, Err(libc::EROFS)), (0x47, Err(libc::EROFS)), (1, Ok(())), (FLAGS, Ok(()))] {
        let fixture = Fixture::simple(flags);
        let export = NbdExportFile::open(&NbdExport::new(Uri::parse(&fixture.fake.uri).unwrap())).unwrap();
        let writer = export.writer();
        assert_eq!(writer.as_ref().map(drop).map_err(|error| error.raw_os_error().unwrap()), opened, "{flags:#x}");
        let Ok(writer) = writer else { continue };
        writer.write_at(b"new", Bytes::ZERO).unwrap();
        let zeroed = if flags == FLAGS { Zeroed::Proven } else { Zeroed::Unproven };
        assert_eq!(writer.make_zero(&range(100, 5000)).unwrap(), zeroed);
        writer.flush().unwrap();
        let mut model = disk();
        model[..3].copy_from_slice(b"new");
        if zeroed == Zeroed::Proven {
            model[100..5000].fill(0);
        }
        assert_eq!(*fixture.fake.disk(), model);
    }
}

#[test]
fn a_server_is_only_sent_the_commands_that_it_has() {
    // HAS_FLAGS alone; with SEND_FUA; with SEND_FUA and SEND_FLUSH.
    for (flags, fua, flushes) in [(1, 0, 0), (9, 1, 0), (13, 0, 1)] {
        let fixture = Fixture::simple(flags);
        let writer = fixture.writer();
        assert_eq!(write(&writer, 512, &[7; 512]), Ok(()));
        assert_eq!(errno(writer.make_zero(&range(0, LEN))), Ok(false));
        assert_eq!(errno(writer.flush()), Ok(()));
        let mut expected = vec![(Step::Write, 512, 512, fua)];
        expected.extend(vec![(Step::Flush, 0, 0, 0); flushes]);
        assert_eq!(fixture.take(), expected, "{flags:#x}");
    }
}

#[test]
fn requests_keep_to_the_block_sizes_of_the_server() {
    let fixture = Fixture::new(Dialect::Structured, FLAGS, (4096, 8192), |_| None);
    let writer = fixture.writer();
    let mut model = disk();
    let bytes: Vec<u8> = (0..5 * BLOCK).map(|at| u8::try_from(at % 7).unwrap()).collect();
    for (at, len) in [(0, BLOCK), (10, 1), (BLOCK - 1, 2), (BLOCK / 2, 4 * BLOCK), (LEN - 3, 3), (BLOCK, 5 * BLOCK)] {
        assert_eq!(write(&writer, at, &bytes[..len]), Ok(()));
        model[at..at + len].copy_from_slice(&bytes[..len]);
        assert!(*fixture.fake.disk() == model, "{at} {len}");
    }
    for (start, end) in [(1, 2), (BLOCK + 1, 4 * BLOCK - 1), (4 * BLOCK, 12 * BLOCK), (LEN - 5000, LEN)] {
        assert_eq!(errno(writer.make_zero(&range(start, end))), Ok(true));
        model[start..end].fill(0);
        assert!(*fixture.fake.disk() == model, "{start}..{end}");
    }
    let sent = fixture.take();
    for (step, at, len, _) in &sent {
        assert!(at % BLOCK == 0 && len % BLOCK == 0, "{step:?} {at} {len}");
        assert!(*step == Step::WriteZeroes || *len <= 2 * BLOCK, "{step:?} {at} {len}");
    }
    assert!(sent.contains(&(Step::WriteZeroes, 4 * BLOCK, 8 * BLOCK, 0)), "zeros have no payload: {sent:?}");
}

/// A block that is zeros completely is made a hole by the server.
#[test]
fn a_block_that_becomes_zeros_is_not_written() {
    let fixture = Fixture::new(Dialect::Structured, FLAGS, (4096, 1 << 20), |_| None);
    fixture.fake.disk()[100..2 * BLOCK - 100].fill(0);
    let writer = fixture.writer();
    assert_eq!(errno(writer.make_zero(&range(0, 2 * BLOCK - 50))), Ok(true));
    let last = fixture.take();
    assert_eq!(last[0], (Step::Read, BLOCK, BLOCK, 0));
    assert_eq!(last[1], (Step::Write, BLOCK, BLOCK, 0), "50 bytes of it stay");
    assert_eq!(last[2], (Step::WriteZeroes, 0, BLOCK, 0));
    assert_eq!(errno(writer.make_zero(&range(2 * BLOCK - 50, 2 * BLOCK))), Ok(true));
    assert_eq!(fixture.take()[1..], [(Step::WriteZeroes, BLOCK, BLOCK, 0)]);
    assert!(fixture.fake.disk()[..2 * BLOCK].iter().all(|byte| *byte == 0));
}

/// While one thread reads a block, changes a part and writes it, the others must not write to it.
#[test]
fn parts_of_a_block_are_written_by_several_threads() {
    const PART: usize = 64;
    let fixture = Fixture::new(Dialect::Structured, FLAGS, (4096, 1 << 20), |_| None);
    let writer = fixture.writer();
    std::thread::scope(|scope| {
        for thread in 0..8_usize {
            let writer = &writer;
            scope.spawn(move || {
                for turn in 0..16_usize {
                    let byte = u8::try_from(thread * 16 + turn + 1).unwrap();
                    let at = (turn * 8 + thread) * PART;
                    assert_eq!(write(writer, at, &[byte; PART]), Ok(()));
                }
            });
        }
    });
    let expected = (0..128).flat_map(|part| [u8::try_from(part % 8 * 16 + part / 8 + 1).unwrap(); PART]);
    assert!(fixture.fake.disk()[..128 * PART].iter().copied().eq(expected));
}

#[test]
fn zeros_that_are_too_many_are_sent_in_parts_and_refused_ones_are_not_proven() {
    // NBD_EINVAL, NBD_EOVERFLOW, NBD_ENOTSUP.
    for error in [22, 75, 95] {
        let longest = 8192;
        let fixture = Fixture::new(Dialect::Structured, FLAGS, (1, longest), move |message| {
            let too_long = message.request.len > u64::from(longest);
            (message.step == Step::WriteZeroes && too_long).then_some(error)
        });
        let writer = fixture.writer();
        assert_eq!(errno(writer.make_zero(&range(0, 20_000))), Ok(true));
        let lengths: Vec<usize> = fixture.take().iter().map(|(_, _, len, _)| *len).collect();
        assert_eq!(lengths, [20_000, 8192, 8192, 3616]);
        let never = Fixture::new(Dialect::Structured, FLAGS, (1, longest), move |message| {
            (message.step == Step::WriteZeroes).then_some(error)
        });
        assert_eq!(errno(never.writer().make_zero(&range(0, 20_000))), Ok(false));
    }
}

#[test]
fn errors_of_the_server_are_those_of_the_protocol() {
    for dialect in DIALECTS {
        for (error, seen) in [
            (1, libc::EPERM),
            (5, libc::EIO),
            (12, libc::ENOMEM),
            (22, libc::EINVAL),
            (28, libc::ENOSPC),
            (75, libc::EOVERFLOW),
            (95, libc::ENOTSUP),
            (6, libc::EINVAL),
            (38, libc::EINVAL),
            (108, libc::ESHUTDOWN),
        ] {
            let fixture = Fixture::new(dialect, FLAGS, (1, 1 << 20), move |message| {
                let fails = matches!(message.step, Step::Write | Step::Flush) && message.connection == 0;
                fails.then_some(error)
            });
            let (writer, other) = (fixture.writer(), fixture.writer());
            assert_eq!(write(&writer, 0, b"x"), Err(seen), "{dialect:?} {error}");
            // "If the client receives an NBD_ESHUTDOWN error it MUST initiate a soft disconnect."
            let again = if error == 108 { Ok(()) } else { Err(seen) };
            assert_eq!(errno(writer.flush()), again, "{dialect:?} {error}");
            if again.is_err() {
                // The server may report only once that it could not flush.
                assert_eq!(errno(other.flush()), Err(libc::EIO), "{dialect:?} {error}");
            }
        }
    }
}

/// A server that handles one request at a time receives nothing while it sends the replies to reads that nobody waits for. The
/// payload is longer than the buffers of a socket.
#[test]
fn a_write_is_sent_while_the_server_sends_replies() {
    const LONG: usize = 1 << 20;
    for dialect in DIALECTS {
        let hook = |message: &mut Message| {
            set_export(message, LONG as u64, FLAGS);
            Action::Continue
        };
        let fake = FakeServer::new(dialect, &vec![1; LONG], Arc::new(hook));
        let timeout = Duration::from_secs(20);
        let client = client(&fake.uri, equal_timeouts(timeout));
        let reads = (0..64).map(|_| {
            let mut buffer = AlignedBuffer::new();
            buffer.resize(LEN);
            (Bytes::ZERO, buffer)
        });
        let begun = client.begin_reads(reads.collect());
        let begin = Instant::now();
        assert_eq!(write(&client.writer().unwrap(), 0, &[2; LONG]), Ok(()), "{dialect:?}");
        assert!(begin.elapsed() < timeout, "{:?}", begin.elapsed());
        for read in begun {
            assert!(read.wait().unwrap().bytes() == [1; LEN]);
        }
        assert!(!client.has_lost_connection());
    }
}
