//! Writes to servers that end, hang, or fail to flush: no error is lost, and each is reported in bounded time.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blkholefs::testing::deadline;
use blkholefs::testing::export::{Export, NbdExportFile};
use blkholefs::testing::handle::Handle;
use blkholefs::testing::source::nbd::{Client, ExportWriter, NbdExport, Timeouts, Uri};
use blkholefs::testing::units::Bytes;

use crate::common::mount::Mount;
use crate::common::nbd::{Server, directory, image};
use crate::common::{MIB, needs, wait_until};
use crate::fake::{Action, BLOCK, Dialect, FakeServer, Message, Step, failure, set_export};
use crate::writes::{disk, errno, range, write};
use crate::{client, default_client, equal_timeouts, read};

const SECOND: Duration = Duration::from_secs(1);
/// The additional time that a loaded machine may need.
const TOLERANCE: Duration = Duration::from_secs(5);
/// The transmission flags `HAS_FLAGS`, `SEND_FLUSH` and `SEND_WRITE_ZEROES`.
const FLAGS: u16 = 0x45;

/// A server that can be written to, with the transmission flags `flags`. `hook` decides what follows a message.
fn server(flags: u16, hook: impl Fn(&mut Message) -> Action + Send + Sync + 'static) -> FakeServer {
    let len = disk().len() as u64;
    let hook = move |message: &mut Message| {
        set_export(message, len, flags);
        hook(message)
    };
    FakeServer::new(Dialect::Structured, &disk(), Arc::new(hook))
}

fn writer(client: &Arc<Client>) -> ExportWriter {
    client.writer().expect("the export can be written")
}

/// Closes the connection without the message.
fn cut(message: &mut Message) -> Action {
    message.bytes.clear();
    Action::Close
}

/// A server that closes the first connection after its reply to a read of one byte.
fn closes_after_a_short_read(flags: u16) -> FakeServer {
    server(flags, |message| match message.step {
        Step::Read if message.request.len <= 512 && message.connection == 0 => Action::Close,
        _ => Action::Continue,
    })
}

#[test]
fn writes_that_were_not_flushed_are_an_error_after_the_connection_was_lost() {
    // With flushes; with neither flushes nor FUA, where a write may be lost just as well.
    for flags in [FLAGS, 0x41] {
        let fake = closes_after_a_short_read(flags);
        let client = default_client(&fake.uri);
        let (first, second) = (writer(&client), writer(&client));
        assert_eq!(write(&first, 0, b"flushed"), Ok(()));
        assert_eq!(errno(first.flush()), Ok(()));
        assert_eq!(write(&first, 100, b"lost?"), Ok(()));
        assert!(read(&client, 0, 1).is_ok());
        assert_eq!(write(&first, 200, b"over the next connection"), Ok(()));
        for writer in [&first, &second] {
            assert_eq!(errno(writer.flush()), Err(libc::EIO), "{flags:#x}");
            assert_eq!(errno(writer.flush()), Ok(()), "{flags:#x}: it is reported once");
        }
        assert_eq!(fake.connections.load(Ordering::Relaxed), 2);
    }
}

#[test]
fn nothing_is_lost_that_was_flushed_or_written_with_fua() {
    // With flushes, and with FUA alone.
    for flags in [FLAGS, 0x49] {
        let fake = closes_after_a_short_read(flags);
        let client = default_client(&fake.uri);
        let writer = writer(&client);
        assert_eq!(write(&writer, 100, b"permanent"), Ok(()));
        if flags == FLAGS {
            assert_eq!(errno(writer.flush()), Ok(()));
        }
        assert!(read(&client, 0, 1).is_ok());
        assert_eq!(errno(writer.flush()), Ok(()), "{flags:#x}");
        assert_eq!(write(&writer, 200, b"later"), Ok(()));
        assert_eq!(errno(writer.flush()), Ok(()), "{flags:#x}");
        assert_eq!(fake.connections.load(Ordering::Relaxed), 2);
    }
}

/// The server has the request and may execute it later, also after a write that follows.
#[test]
fn a_write_without_an_answer_is_an_error_and_ends_the_writing() {
    for step in [Step::Write, Step::WriteZeroes] {
        let fake = server(FLAGS, move |message| match message.connection {
            0 if message.step == step => cut(message),
            _ => Action::Continue,
        });
        let client = default_client(&fake.uri);
        let (first, second) = (writer(&client), writer(&client));
        let result = match step {
            Step::Write => write(&first, 0, b"?"),
            _ => errno(first.make_zero(&range(0, 10))).map(drop),
        };
        assert_eq!(result, Err(libc::EIO));
        assert!(read(&client, 5 * BLOCK as u64, 10).is_ok(), "reads go on");
        for writer in [&first, &second] {
            assert_eq!(write(writer, 0, b"no"), Err(libc::EIO));
            assert_eq!(errno(writer.make_zero(&range(0, 10))), Err(libc::EIO));
            assert_eq!(errno(writer.flush()), Err(libc::EIO));
        }
        let again = writer(&client);
        assert_eq!(write(&again, 0, b"yes"), Ok(()));
        assert_eq!(errno(again.flush()), Ok(()));
        assert_eq!(fake.disk()[..3], *b"yes");
    }
}

/// A program that keeps its file open after the error does not keep others from writing.
#[test]
fn a_file_of_a_mount_can_be_opened_again_after_a_write_without_an_answer() {
    needs!(root);
    let is_cut = Arc::new(AtomicBool::new(false));
    let cuts = Arc::clone(&is_cut);
    let fake = server(FLAGS, move |message| match message.step {
        Step::Write if cuts.swap(false, Ordering::Relaxed) => cut(message),
        _ => Action::Continue,
    });
    let mount = Mount::writable(fake.uri.as_ref());
    let path = mount.directory().join("nbd");
    let open = || OpenOptions::new().read(true).write(true).open(&path).expect("it is opened");
    let write = |file: &File, bytes: &[u8]| file.write_all_at(bytes, 0).map_err(|error| error.raw_os_error());
    let failed = open();
    assert_eq!(write(&failed, b"old"), Ok(()));
    failed.sync_all().unwrap();
    is_cut.store(true, Ordering::Relaxed);
    assert_eq!(write(&failed, b"lost?"), Err(Some(libc::EIO)));
    let again = open();
    assert_eq!(write(&again, b"new"), Ok(()), "{}", mount.log());
    again.sync_all().unwrap();
    assert_eq!(write(&failed, b"no"), Err(Some(libc::EIO)), "the order of its writes is unknown");
    assert_eq!(fake.disk()[..3], *b"new");
    nix::unistd::truncate(&path, 0).unwrap();
    assert_eq!(fake.disk()[..3], [0; 3]);
}

/// Each step of a truncation has the time of a request: all of them may take longer.
#[test]
fn a_long_truncation_ends_at_no_deadline() {
    const LIMIT: Duration = Duration::from_secs(3);
    let data = vec![7; 40 << 20];
    let len = data.len() as u64;
    let hook = move |message: &mut Message| {
        // Flushes, and no requests for zeros: all is read first.
        set_export(message, len, 0x05);
        if message.step == Step::Read {
            std::thread::sleep(Duration::from_millis(100));
        }
        Action::Continue
    };
    let fake = FakeServer::new(Dialect::Structured, &data, Arc::new(hook));
    let export = NbdExportFile::open(&NbdExport::new(Uri::parse(&fake.uri).unwrap())).unwrap();
    let export: Arc<dyn Export> = Arc::new(export);
    let writer = export.writer().unwrap();
    let handle = Handle::new(export, Arc::default(), Arc::default());
    let begin = Instant::now();
    deadline::within(LIMIT, || handle.make_zero(&*writer, Bytes::ZERO..Bytes::new(len))).unwrap();
    assert!(begin.elapsed() > LIMIT);
    assert!(fake.disk().iter().all(|byte| *byte == 0));
}

#[test]
fn a_flush_without_an_answer_is_an_error_if_it_covers_something() {
    let flushes = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&flushes);
    let fake = server(FLAGS, move |message| match message.step {
        // The first flush of each connection, while there are few.
        Step::Flush if counted.fetch_add(1, Ordering::Relaxed) < 2 => cut(message),
        _ => Action::Continue,
    });
    let client = default_client(&fake.uri);
    let writer = writer(&client);
    assert_eq!(write(&writer, 0, b"lost?"), Ok(()));
    assert_eq!(errno(writer.flush()), Err(libc::EIO));
    assert_eq!(
        flushes.load(Ordering::Relaxed),
        1,
        "a second flush would succeed, for a server that has lost the bytes"
    );
    assert_eq!(errno(writer.flush()), Ok(()), "nothing was written since, so the flush is sent again");
    assert_eq!(flushes.load(Ordering::Relaxed), 3);
}

#[test]
fn a_flush_that_fails_is_an_error_of_each_writer() {
    let fails = Arc::new(AtomicBool::new(true));
    let once = Arc::clone(&fails);
    let fake = server(FLAGS, move |message| {
        if message.step == Step::Flush && once.swap(false, Ordering::Relaxed) {
            message.bytes = failure(Dialect::Structured, message.request.cookie, 28);
        }
        Action::Continue
    });
    let client = default_client(&fake.uri);
    let (first, second) = (writer(&client), writer(&client));
    assert_eq!(write(&second, 0, b"?"), Ok(()));
    assert_eq!(errno(first.flush()), Err(libc::ENOSPC));
    assert_eq!(errno(first.flush()), Ok(()));
    assert_eq!(errno(second.flush()), Err(libc::EIO));
    assert_eq!(errno(second.flush()), Ok(()));
    assert_eq!(errno(writer(&client).flush()), Ok(()));
}

#[test]
fn a_server_that_hangs_is_eio_in_bounded_time() {
    for step in [Step::Write, Step::WriteZeroes, Step::Flush] {
        let fake = server(FLAGS, move |message| match message.step {
            current if current == step => {
                message.bytes.clear();
                Action::Stall
            }
            _ => Action::Continue,
        });
        let client = client(&fake.uri, equal_timeouts(SECOND));
        let writer = writer(&client);
        let begin = Instant::now();
        let result = match step {
            Step::Write => write(&writer, 0, &[1; BLOCK]),
            Step::WriteZeroes => errno(writer.make_zero(&range(0, BLOCK))).map(drop),
            _ => errno(writer.flush()),
        };
        assert_eq!(result, Err(libc::EIO), "{step:?}");
        assert!(begin.elapsed() < SECOND + TOLERANCE, "{step:?}: {:?}", begin.elapsed());
    }
}

/// A server that does not receive: the payload does not fit into the buffers of the socket.
#[test]
fn a_server_that_receives_nothing_is_eio_in_bounded_time() {
    let (over, stopped) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (is_over, has_stopped) = (Arc::clone(&over), Arc::clone(&stopped));
    let fake = server(FLAGS, move |message| match message.step {
        Step::Read => {
            has_stopped.store(true, Ordering::Relaxed);
            message.bytes.clear();
            assert!(wait_until(|| is_over.load(Ordering::Relaxed)));
            Action::Close
        }
        _ => Action::Continue,
    });
    let client = client(&fake.uri, equal_timeouts(2 * SECOND));
    let writer = writer(&client);
    let begin = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(read(&client, 0, 1), Err(libc::EIO)));
        assert!(wait_until(|| stopped.load(Ordering::Relaxed)));
        for _ in 0..16 {
            scope.spawn(|| assert_eq!(write(&writer, 0, &disk()), Err(libc::EIO)));
        }
    });
    let took = begin.elapsed();
    over.store(true, Ordering::Relaxed);
    assert!(took < 2 * SECOND + TOLERANCE, "{took:?}");
}

/// A server that handles one request at a time: a write waits for a flush, and a read that waits too long fails alone.
#[test]
fn a_slow_flush_is_no_error() {
    let (release, started) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (released, has_started) = (Arc::clone(&release), Arc::clone(&started));
    let fake = server(FLAGS, move |message| {
        if message.step == Step::Flush && message.connection == 0 {
            has_started.store(true, Ordering::Relaxed);
            assert!(wait_until(|| released.load(Ordering::Relaxed)), "the read fails first");
        }
        Action::Continue
    });
    let timeouts = Timeouts { flush: 50 * SECOND, ..equal_timeouts(SECOND) };
    let client = client(&fake.uri, timeouts);
    let writer = writer(&client);
    assert_eq!(write(&writer, 0, b"old"), Ok(()));
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(errno(writer.flush()), Ok(())));
        assert!(wait_until(|| started.load(Ordering::Relaxed)));
        let begin = Instant::now();
        let late_write = scope.spawn(|| write(&writer, 0, b"new"));
        assert_eq!(read(&client, 0, 3), Err(libc::EIO));
        assert!(begin.elapsed() < SECOND + TOLERANCE, "{:?}", begin.elapsed());
        // The write has its own time too.
        assert!(wait_until(|| begin.elapsed() > 2 * SECOND));
        release.store(true, Ordering::Relaxed);
        assert_eq!(late_write.join().unwrap(), Ok(()));
    });
    assert_eq!(read(&client, 0, 3), Ok(b"new".to_vec()));
    assert_eq!(fake.connections.load(Ordering::Relaxed), 1);
}

/// A server is killed again and again. What was flushed without an error is on its disk.
#[test]
fn what_was_flushed_without_an_error_survives_the_server() {
    needs!(programs["nbdkit"]);
    let directory = directory();
    let (path, socket) = (directory.path().join("disk"), directory.path().join("s"));
    image(&path, MIB, &[]);
    let mut server = Server::nbdkit(&socket, &["file", path.to_str().unwrap()]);
    let client = default_client(&format!("nbd+unix:///?socket={}", socket.display()));
    // For each slot, the last byte that a flush without an error covers, and the number of later bytes.
    let flushed = Mutex::new(vec![(0_u8, 0_u8); 8]);
    let flushes = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for slot in 0..8_usize {
            let (client, flushed, flushes, stop) = (&client, &flushed, &flushes, &stop);
            scope.spawn(move || {
                let mut turn = 0_u8;
                while !stop.load(Ordering::Relaxed) {
                    // A new writer after each error, as a program that opens the file again.
                    let writer = writer(client);
                    while !stop.load(Ordering::Relaxed) {
                        turn = turn.wrapping_add(1);
                        flushed.lock().unwrap()[slot].1 += 1;
                        if write(&writer, slot * 8192 + 5, &[turn; 8000]).is_err() || errno(writer.flush()).is_err() {
                            break;
                        }
                        flushed.lock().unwrap()[slot] = (turn, 0);
                        flushes.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        for _ in 0..5 {
            let before = flushes.load(Ordering::Relaxed);
            let more = wait_until(|| flushes.load(Ordering::Relaxed) > before + 50);
            if !more {
                stop.store(true, Ordering::Relaxed);
            }
            assert!(more);
            server.kill();
            server.restart();
        }
        stop.store(true, Ordering::Relaxed);
    });
    let disk = std::fs::read(&path).unwrap();
    for (slot, (turn, later)) in flushed.into_inner().unwrap().into_iter().enumerate() {
        // Writes after the flush may be there as a whole or in part.
        let slot = &disk[slot * 8192 + 5..][..8000];
        assert!(slot.iter().all(|byte| byte.wrapping_sub(turn) <= later), "{turn} {later}");
    }
}
