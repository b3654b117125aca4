//! An NBD server that takes 5 ms for each request, against the clients that keep many requests under way.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Client, copy, directory, only_file, text};
use crate::Bench;
use crate::common::mount::Mount;
use crate::common::nbd::Server;
use crate::common::run;
use crate::measure::{Contender, Measured, Pair, Table, rounds, seconds};
use crate::shape::Shape;

/// What each read takes.
pub const READS: &str = "rdelay=5ms";
/// What each question about block status takes.
const STATUS: &str = "delay-extents=5ms";
/// The option of a device that nobody writes to, whose map is not asked for again.
const STATIC: &[&str] = &["-o", "static"];

/// Bytes of an extent.
const EXTENT: u64 = 64 << 10;

/// The server's log, in the directory of its image.
const LOG: &str = "log";

/// A server of an image in memory.
pub struct Slow {
    _server: Server,
    uri: String,
    directory: tempfile::TempDir,
}

impl Slow {
    /// Serves an image of this shape, read-only, so that the server offers several connections; with words for nbdkit.
    pub fn new(bench: &Bench, shape: Shape, words: &[&str]) -> Self {
        let directory = directory(bench);
        let (image, socket) = (directory.path().join("image"), directory.path().join("socket"));
        shape.write(&image);
        let log = format!("logfile={}", directory.path().join(LOG).display());
        let all = ["--readonly", "--filter=log", "--filter=delay", "file", text(&image), &log];
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        Self { _server: Server::nbdkit(&socket, &[&all[..], words].concat()), uri, directory }
    }

    /// Bytes that clients asked for in all read requests so far.
    pub fn bytes_read(&self) -> u64 {
        let log = fs::read_to_string(self.directory.path().join(LOG)).expect("the server writes a log");
        let requests = log.lines().filter(|line| line.contains(" Read id="));
        // The line of a reply has no count.
        let counts = requests.filter_map(|line| line.split_once(" count=0x")?.1.split_whitespace().next());
        counts.map(|count| u64::from_str_radix(count, 16).expect("a number of bytes")).sum()
    }

    /// The server's socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// A new mount, with nothing kept from the last one, and the file in it.
    pub fn mount(&self, options: &[&str]) -> (Mount, PathBuf) {
        let mount = Mount::with_options(Path::new(&self.uri), options);
        let file = only_file(mount.directory());
        (mount, file)
    }

    /// What a client takes for the file of a new mount, in seconds.
    fn read(&self, client: Client, options: &[&str]) -> f64 {
        let (_mount, file) = self.mount(options);
        client.read(&file, &self.copy())
    }

    /// What nbdcopy takes for the same, to a file in memory.
    fn nbdcopy(&self) -> f64 {
        let to = self.copy();
        copy("nbdcopy", &[&self.uri, text(&to)], &to)
    }

    /// What nbdcopy takes to read the export, to nowhere.
    fn nbdcopy_to_nowhere(&self) -> f64 {
        seconds(|| {
            run("nbdcopy", [&self.uri, "null:"]);
        })
    }

    /// What qemu-img takes for the same, with as many requests as it allows, written in any order.
    fn qemu_img(&self) -> f64 {
        let to = self.copy();
        let how = ["convert", "-m", "16", "-W", "-f", "raw", "-O", "raw"];
        copy("qemu-img", &[&how[..], &[&self.uri, text(&to)]].concat(), &to)
    }

    fn copy(&self) -> PathBuf {
        self.directory.path().join("copy")
    }
}

/// All rows with an NBD server.
pub fn all(bench: &Bench, table: &mut Table) {
    if !["nbdkit", "nbdcopy"].iter().all(|program| bench.has(table, program, "a slow NBD server")) {
        return;
    }
    sparse(bench, table);
    status(bench, table);
    dense(bench, table);
}

/// The shape of the sparse export.
fn shape() -> Shape {
    Shape::new(2 << 30, 320, EXTENT)
}

/// Sparse copies where each read takes 5 ms.
fn sparse(bench: &Bench, table: &mut Table) {
    let slow = &Slow::new(bench, shape(), &[READS]);
    let clients = [Client::Cp, Client::Tar, Client::Reader];
    let ours = |client: Client| Contender::new(client.name(), move || slow.read(client, &[]));
    let mut contenders: Vec<Contender<'_>> = clients.map(ours).into();
    contenders.push(Contender::new("nbdcopy", || slow.nbdcopy()));
    let mut targets = vec![Some(1.3)];
    if bench.has(table, "qemu-img", "a slow NBD server") {
        contenders.push(Contender::new("qemu-img -m 16 -W", || slow.qemu_img()));
        targets.push(Some(1.3));
    }
    let measured = rounds(bench.rounds(), contenders);
    compare(table, "NBD, 5 ms, 320 extents of 64 KiB in 2 GiB", &measured, &clients, &targets);
}

/// A sparse copy where each question about block status takes 5 ms too, of an export that nobody writes to.
fn status(bench: &Bench, table: &mut Table) {
    let (options, with) = if has_static() { (STATIC, ", -o static") } else { (&[][..], "") };
    if options.is_empty() {
        table.skip("-o static", "the program has no such option; the row of a slow block status is without it");
    }
    let slow = Slow::new(bench, shape(), &[READS, STATUS]);
    let contenders =
        vec![Contender::new("ours", || slow.read(Client::Cp, options)), Contender::new("nbdcopy", || slow.nbdcopy())];
    let measured = rounds(bench.rounds(), contenders);
    table.add(&format!("cp, NBD, 5 ms, block status 5 ms too{with}"), "s", &measured, &[Some(1.5)]);
}

/// Whether the program has the option [`STATIC`].
fn has_static() -> bool {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blkholefs"));
    let output = command.args(["mount", "-f"]).args(STATIC).args(["/nonexistent", "/nonexistent"]).output();
    let output = output.expect("the program starts");
    !String::from_utf8_lossy(&output.stderr).contains("unknown option")
}

/// Copies of data without holes, where each read takes 5 ms.
fn dense(bench: &Bench, table: &mut Table) {
    let size = bench.scale(512 << 20, 4);
    let slow = Slow::new(bench, Shape::dense(size), &[READS]);
    let case = |what: &str| format!("{what}, NBD, 5 ms, {} MiB of data", size >> 20);
    let contenders =
        vec![Contender::new("ours", || slow.read(Client::Cp, &[])), Contender::new("nbdcopy", || slow.nbdcopy())];
    table.add(&case("cp"), "s", &rounds(bench.rounds(), contenders), &[Some(1.2)]);
    let contenders = vec![
        Contender::new("ours", || slow.read(Client::Cat, &[])),
        Contender::new("nbdcopy to null:", || slow.nbdcopy_to_nowhere()),
    ];
    table.add(&case("cat"), "s", &rounds(bench.rounds(), contenders), &[Some(1.2)]);
}

/// Compares each client, which come first, with each peer, which come after them.
fn compare(table: &mut Table, what: &str, measured: &Measured, clients: &[Client], targets: &[Option<f64>]) {
    for (ours, client) in clients.iter().enumerate() {
        let case = format!("{}, {what}", client.name());
        for (peer, target) in targets.iter().enumerate() {
            table.pair(&case, "s", measured, Pair { ours, other: clients.len() + peer, target: *target });
        }
    }
}
