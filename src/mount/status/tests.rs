use std::ffi::OsString;
use std::io::Read;
use std::time::UNIX_EPOCH;

use super::*;
use crate::fs::{FileStatus, Ownership, Status};
use crate::handle::DenseLayer;
use crate::spec::Spec;
use crate::units::Bytes;

const DEVICE: DeviceId = DeviceId { major: 0, minor: 45 };

/// A state with all that an answer can have, and names that need escapes.
fn full() -> Status {
    let dense = |layer: &str, reason: &str, since: Option<u64>| DenseLayer {
        layer: layer.to_owned(),
        reason: reason.to_owned(),
        since: since.map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds)),
        is_degraded: since.is_some(),
    };
    let file = |name: &str, dense: Vec<DenseLayer>| FileStatus {
        name: name.into(),
        opens: 2,
        map_memory: Bytes::new(4096),
        dense,
    };
    let both = vec![dense("/dev/a b", "it is\nsuspended\\", Some(1_700_000_000)), dense("", "", None)];
    Status {
        open_files: 3,
        map_memory: Bytes::new(1),
        map_limit: Bytes::MAX,
        read_ahead: Bytes::new(2),
        names: 4,
        files: vec![file("a \n\x1b\\040", both), file("", Vec::new())],
    }
}

#[test]
fn an_answer_is_read_as_it_was_written() {
    for status in [full(), Status::default()] {
        assert_eq!(parse(&format(&status)), Some(status));
    }
    let later = b"blkholefs status\nopen-files 1 x\nnew word\nfile 1 2 a more\nend\n";
    let status = parse(later).unwrap();
    assert_eq!((status.open_files, status.files.len()), (1, 1), "words and values of later versions are skipped");
}

#[test]
fn an_answer_that_is_cut_short_or_garbage_is_none() {
    let whole = format(&full());
    for end in 0..whole.len() {
        assert_eq!(parse(&whole[..end]), None, "{end} bytes");
    }
    for text in [
        &b""[..],
        b"end\n",
        b"blkholefs status\n",
        b"blkholefs status\nopen-files x\nend\n",
        b"blkholefs status\nopen-files 18446744073709551616\nend\n",
        b"blkholefs status\ndense 1 - a b\nend\n",
        b"blkholefs status\nfile 1 1 a\ndense 1 253402300800 a b\nend\n",
        b"blkholefs status\nfile 1 a\nend\n",
    ] {
        assert_eq!(parse(text), None, "{}", String::from_utf8_lossy(text));
    }
    assert_eq!(parse(&vec![b'\n'; message::LONGEST + 1]), None);
}

#[test]
fn an_answer_has_a_longest_length() {
    let name = OsString::from("x".repeat(10_000));
    let file = FileStatus { name, opens: 1, map_memory: Bytes::ZERO, dense: Vec::new() };
    let status = Status { open_files: 1000, files: vec![file; 1000], ..Status::default() };
    let answer = format(&status);
    assert!(answer.len() <= message::LONGEST);
    let parsed = parse(&answer).unwrap();
    assert!((200..1000).contains(&parsed.files.len()) && parsed.open_files == 1000);
    assert_eq!(parsed.files[0].name.len(), 4096);
}

/// A daemon's side, for the file system of an image.
fn served(directory: &Path) -> (StatusSocket, Arc<FileSystem>) {
    let image = directory.join("image");
    std::fs::write(&image, [1; 4096]).unwrap();
    let spec = Spec::parse(image.as_os_str()).unwrap();
    let ownership = Ownership { uid: None, gid: None, mode: 0o777, is_writable: false };
    let fs = FileSystem::new(&spec, &Default::default(), ownership, Default::default()).unwrap();
    let (socket, fs) = (StatusSocket::new(directory, DEVICE).unwrap(), Arc::new(fs));
    socket.answer(&fs).unwrap();
    (socket, fs)
}

fn names(count: usize) -> Vec<String> {
    vec![record::socket_name(DEVICE, Pid::this()); count]
}

#[test]
fn many_questions_at_a_time_are_answered() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let (socket, fs) = served(directory.path());
    let mode = std::fs::metadata(&socket.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    for answer in ask::all(directory.path(), &names(50), Duration::from_secs(60)) {
        assert_eq!(answer.process, Some(Some(Pid::this())));
        assert_eq!(answer.answer.unwrap().open_files, 0);
    }
    drop(fs);
    let answer = ask::all(directory.path(), &names(1), Duration::from_secs(60)).remove(0).answer;
    assert_eq!(answer.unwrap_err().kind(), io::ErrorKind::UnexpectedEof, "the thread keeps no file system");
    drop(socket);
    let answer = ask::all(directory.path(), &names(1), Duration::from_secs(60)).remove(0).answer;
    assert_eq!(answer.unwrap_err().kind(), io::ErrorKind::NotFound);
}

#[test]
fn the_path_of_the_directory_may_be_longer_than_an_address() {
    let directory = tempfile::tempdir().unwrap();
    let long = directory.path().join("x".repeat(200));
    std::fs::create_dir(&long).unwrap();
    let (_socket, _fs) = served(&long);
    assert!(ask::all(&long, &names(1), Duration::from_secs(60)).remove(0).answer.is_ok());
}

#[test]
fn a_daemon_that_does_not_answer_ends_the_question_at_its_deadline() {
    let directory = tempfile::tempdir().unwrap();
    // Nothing accepts its connections.
    let silent = StatusSocket::new(directory.path(), DEVICE).unwrap();
    let start = Instant::now();
    // More than the queue of connections holds.
    for answer in ask::all(directory.path(), &names(200), Duration::from_millis(50)) {
        let kind = answer.answer.unwrap_err().kind();
        assert!(matches!(kind, io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock), "{kind}");
    }
    assert!(start.elapsed() < Duration::from_secs(30));
    drop(silent);
}

#[test]
fn an_answer_without_end_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let socket = StatusSocket::new(directory.path(), DEVICE).unwrap();
    let listener = socket.listener.clone();
    let endless = thread::spawn(move || {
        let (mut connection, _) = listener.accept().unwrap();
        while connection.write_all(&[b'x'; 4096]).is_ok() {}
    });
    let answer = ask::all(directory.path(), &names(1), Duration::from_secs(60)).remove(0).answer;
    assert_eq!(answer.unwrap_err().kind(), io::ErrorKind::InvalidData);
    endless.join().unwrap();
}

#[test]
fn a_reader_that_does_not_read_is_left_after_a_second() {
    let (reader, writer) = UnixStream::pair().unwrap();
    let start = Instant::now();
    let error = send(writer, &vec![0; 8 << 20]).unwrap_err();
    assert!(matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock), "{error}");
    assert!(start.elapsed() >= LONGEST_ANSWER / 2);
    let mut got = Vec::new();
    (&reader).read_to_end(&mut got).unwrap();
    assert!(got.len() < 8 << 20);
}
