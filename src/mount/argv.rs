//! The command lines of `mount.blkholefs`, `umount.blkholefs`, `blkholefs mount` and `blkholefs umount`.
//!
//! mount(8) calls `mount.blkholefs SPEC DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]`; people write the operands
//! last. Both orders, bundled flags and several `-o` are accepted.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use lexopt::Arg::{Long, Short, Value};

use crate::error::{Error, Result};
use crate::mount::options::{self, FirstRw};
use crate::sys::mountinfo::FS_TYPE;

/// A parsed command line.
#[derive(Debug, PartialEq, Eq)]
pub enum CommandLine<T> {
    /// Run the command.
    Run(T),
    /// Print the usage.
    Help,
    /// Print the version.
    Version,
}

/// One mount to make.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountRequest {
    /// What to mount, as typed.
    pub spec: OsString,
    /// Where, as typed.
    pub dir: PathBuf,
    /// The options of all `-o`, joined by commas.
    pub options: OsString,
    /// What `rw` as the first option means.
    pub first_rw: FirstRw,
    /// Do everything but mount (`-f` of mount(8)).
    pub fake: bool,
    /// Warn about unknown options instead of failing (`-s`).
    pub sloppy: bool,
    /// Print what is done (`-v`).
    pub verbose: bool,
    /// Serve in the calling process, and log to its standard error.
    pub foreground: bool,
    /// The mount namespace to mount in (`-N`).
    pub namespace: Option<PathBuf>,
}

/// One mount to end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UmountRequest {
    /// The directory of the mount, or its SPEC.
    pub target: PathBuf,
    /// Abort pending requests (`-f`).
    pub force: bool,
    /// Detach the mount now, although it is in use (`-l`).
    pub lazy: bool,
    /// Print what is done (`-v`).
    pub verbose: bool,
    /// The mount namespace to unmount in (`-N`).
    pub namespace: Option<PathBuf>,
}

/// Parses what mount(8) passes to `mount.blkholefs`.
///
/// # Errors
/// A usage error: an unknown flag, a missing or a third operand, the type of another file system.
pub fn mount_helper(args: &[OsString]) -> Result<CommandLine<MountRequest>> {
    let mut request = MountRequest::default();
    let mut operands = Vec::new();
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next().map_err(wrong)? {
        match arg {
            Short('f') => request.fake = true,
            Short('s') => request.sloppy = true,
            // `-n` suppresses an entry in /etc/mtab, and this program writes none.
            Short('n') => {}
            Short('v') => request.verbose = true,
            Short('N') => request.namespace = Some(parser.value().map_err(wrong)?.into()),
            Short('t') => check_type(&parser.value().map_err(wrong)?)?,
            Short('o') => options::append(&mut request.options, &parser.value().map_err(wrong)?),
            Short('h') | Long("help") => return Ok(CommandLine::Help),
            Short('V') | Long("version") => return Ok(CommandLine::Version),
            Value(operand) => operands.push(operand),
            other => return Err(wrong(other.unexpected())),
        }
    }
    finish_mount(request, operands)
}

/// Parses the words after `blkholefs mount`, where `-f` is `--foreground`.
///
/// # Errors
/// A usage error, as for [`mount_helper`].
pub fn mount_command(args: &[OsString]) -> Result<CommandLine<MountRequest>> {
    let mut request = MountRequest::default();
    let mut operands = Vec::new();
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next().map_err(wrong)? {
        match arg {
            Short('f') | Long("foreground") => request.foreground = true,
            Short('v') | Long("verbose") => request.verbose = true,
            Short('o') | Long("options") => options::append(&mut request.options, &parser.value().map_err(wrong)?),
            Short('h') | Long("help") => return Ok(CommandLine::Help),
            Short('V') | Long("version") => return Ok(CommandLine::Version),
            Value(operand) => operands.push(operand),
            other => return Err(wrong(other.unexpected())),
        }
    }
    finish_mount(request, operands)
}

/// Parses the words that mount.fuse3(8) runs this program with for `mount -t fuse 'blkholefs#SPEC' DIR`, and for the type
/// fuse.blkholefs where there is no `mount.fuse.blkholefs`: `SPEC DIR -o OPTIONS`. `None` for all other words.
///
/// mount.fuse3 adds `dev` and `suid` to each list that has not `nodev` or `nosuid`. These two are removed, so that the mount is
/// as safe as all others.
pub fn mount_fuse(args: &[OsString]) -> Option<MountRequest> {
    let [spec, dir, flag, options] = args else { return None };
    if spec.as_bytes().starts_with(b"-") || flag != "-o" {
        return None;
    }
    let mut list = options.as_bytes();
    for (added, opposite) in [(&b"suid"[..], &b"nosuid"[..]), (b"dev", b"nodev")] {
        let is_added = list.split(|byte| *byte == b',').all(|word| word != opposite);
        list = match list.strip_suffix(added).filter(|_| is_added) {
            Some([rest @ .., b',']) => rest,
            Some([]) => b"",
            _ => list,
        };
    }
    let options = OsStr::from_bytes(list).to_owned();
    Some(MountRequest { spec: spec.clone(), dir: dir.into(), options, ..MountRequest::default() })
}

/// Parses what umount(8) passes to `umount.blkholefs`, and the words after `blkholefs umount`.
///
/// # Errors
/// A usage error: an unknown flag, no operand or more than one, the type of another file system.
pub fn umount(args: &[OsString]) -> Result<CommandLine<UmountRequest>> {
    let mut request = UmountRequest::default();
    let mut operands = Vec::new();
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next().map_err(wrong)? {
        match arg {
            Short('f') => request.force = true,
            Short('l') => request.lazy = true,
            // `-n` is for /etc/mtab, and `-r` remounts a busy file system read-only. This one is read-only.
            Short('n' | 'r') => {}
            Short('v') => request.verbose = true,
            Short('N') => request.namespace = Some(parser.value().map_err(wrong)?.into()),
            Short('t') => check_type(&parser.value().map_err(wrong)?)?,
            // umount(8) has no such option; some versions pass the options of the mount table.
            Short('o') => drop(parser.value().map_err(wrong)?),
            Short('h') | Long("help") => return Ok(CommandLine::Help),
            Short('V') | Long("version") => return Ok(CommandLine::Version),
            Value(operand) => operands.push(operand),
            other => return Err(wrong(other.unexpected())),
        }
    }
    match <[OsString; 1]>::try_from(operands) {
        Ok([target]) if !target.is_empty() => Ok(CommandLine::Run(UmountRequest { target: target.into(), ..request })),
        _ => Err(Error::usage("expected one directory to unmount")),
    }
}

fn finish_mount(request: MountRequest, operands: Vec<OsString>) -> Result<CommandLine<MountRequest>> {
    match <[OsString; 2]>::try_from(operands) {
        Ok([spec, dir]) if !spec.is_empty() && !dir.is_empty() => {
            Ok(CommandLine::Run(MountRequest { spec, dir: dir.into(), ..request }))
        }
        _ => Err(Error::usage("expected a device and a directory")),
    }
}

/// Checks the file system type of the option `-t`: `blkholefs` or `fuse.blkholefs`, either with or without a subtype
/// after a dot. For these types mount(8) runs this program.
fn check_type(name: &OsStr) -> Result<()> {
    let program = FS_TYPE.as_bytes().strip_prefix(b"fuse.").unwrap_or_default();
    let name = name.as_bytes();
    let without_fuse = name.strip_prefix(b"fuse.").unwrap_or(name);
    match without_fuse.strip_prefix(program) {
        Some(b"" | [b'.', ..]) => Ok(()),
        _ => Err(Error::usage(format!("file system type '{}' is not {FS_TYPE}", String::from_utf8_lossy(name)))),
    }
}

fn wrong(error: lexopt::Error) -> Error {
    Error::usage(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    fn helper(line: &str) -> MountRequest {
        match mount_helper(&words(line)) {
            Ok(CommandLine::Run(request)) => request,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn expected(options: &str) -> MountRequest {
        MountRequest { spec: "/dev/x".into(), dir: "/m".into(), options: options.into(), ..MountRequest::default() }
    }

    #[test]
    fn command_lines_of_mount() {
        assert_eq!(helper("/dev/x /m -o rw"), expected("rw"));
        assert_eq!(helper("/dev/x /m -f -o rw"), MountRequest { fake: true, ..expected("rw") });
        let verbose = MountRequest { sloppy: true, verbose: true, ..expected("ro,nosuid,") };
        assert_eq!(helper("/dev/x /m -s -n -v -o ro,nosuid,"), verbose);
        assert_eq!(helper("/dev/x /m -o rw -t blkholefs.sub"), expected("rw"));
        let elsewhere = MountRequest { namespace: Some("/proc/1/ns/mnt".into()), ..expected("rw") };
        assert_eq!(helper("/dev/x /m -o rw -N /proc/1/ns/mnt"), elsewhere);
    }

    #[test]
    fn command_lines_of_people() {
        assert_eq!(helper("-o ro -oallow_other /dev/x /m"), expected("ro,allow_other"));
        assert_eq!(helper("-o ro /dev/x /m -o uid=1"), expected("ro,uid=1"));
        assert_eq!(helper("/dev/x -sfnv /m"), MountRequest { sloppy: true, fake: true, verbose: true, ..expected("") });
        assert_eq!(helper("-fo ro /dev/x /m"), MountRequest { fake: true, ..expected("ro") });
        assert_eq!(helper("-t fuse.blkholefs -- /dev/x /m"), expected(""));
        let odd = helper("-- -o -s");
        assert_eq!((odd.spec, odd.dir), ("-o".into(), "-s".into()));
    }

    #[test]
    fn the_flag_f_of_the_subcommand_is_foreground() {
        let parsed = mount_command(&words("-f -o ro /dev/x /m")).unwrap();
        assert_eq!(parsed, CommandLine::Run(MountRequest { foreground: true, ..expected("ro") }));
        let parsed = mount_command(&words("/dev/x /m --foreground --options=ro -v")).unwrap();
        assert_eq!(parsed, CommandLine::Run(MountRequest { foreground: true, verbose: true, ..expected("ro") }));
        assert!(mount_command(&words("-s /dev/x /m")).is_err());
    }

    #[test]
    fn command_lines_of_mount_fuse() {
        for (given, options) in [
            ("rw,dev,suid", "rw"),
            ("ro,mode=0400,dev,suid", "ro,mode=0400"),
            ("dev,suid", ""),
            ("suid", ""),
            ("ro,nodev,suid", "ro,nodev"),
            ("ro,nosuid,dev", "ro,nosuid"),
            ("ro,nodev,nosuid", "ro,nodev,nosuid"),
            ("nodev,name=a\\,dev,suid", "nodev,name=a\\,dev"),
            ("ro,dev,suid,x-a", "ro,dev,suid,x-a"),
        ] {
            assert_eq!(mount_fuse(&words(&format!("/dev/x /m -o {given}"))), Some(expected(options)), "{given}");
        }
        for line in
            ["", "/dev/x", "/dev/x /m", "/dev/x /m -o", "/dev/x /m -v ro", "-v /dev/x -o ro", "/dev/x /m -o ro x"]
        {
            assert_eq!(mount_fuse(&words(line)), None, "{line}");
        }
    }

    #[test]
    fn command_lines_of_umount() {
        let request = UmountRequest { target: "/m".into(), ..UmountRequest::default() };
        for line in ["/m", "/m -n", "/m -t fuse.blkholefs", "-nr -t blkholefs /m", "/m -o x"] {
            assert_eq!(umount(&words(line)).unwrap(), CommandLine::Run(request.clone()), "{line}");
        }
        let flags = UmountRequest { force: true, lazy: true, verbose: true, namespace: Some("/n".into()), ..request };
        assert_eq!(umount(&words("/m -flv -N /n")).unwrap(), CommandLine::Run(flags));
        for line in ["", "/a /b", "/m -x", "/m -t ext4"] {
            assert_eq!(umount(&words(line)).unwrap_err().exit_code(), 1, "{line}");
        }
        assert!(umount(&[OsString::new()]).is_err());
    }

    #[test]
    fn help_and_version_win_over_missing_operands() {
        for (line, expected) in [("-h", CommandLine::Help), ("--help", CommandLine::Help), ("-V", CommandLine::Version)]
        {
            assert_eq!(mount_helper(&words(line)).unwrap(), expected, "{line}");
        }
        assert_eq!(umount(&words("--version")).unwrap(), CommandLine::Version);
    }

    #[test]
    fn wrong_lines_are_usage_errors_and_never_exit_with_2() {
        for line in ["", "/dev/x", "/dev/x /m /n", "-o", "-x /dev/x /m", "--frob /dev/x /m", "/dev/x /m -t ext4", "-N"]
        {
            let error = mount_helper(&words(line)).unwrap_err();
            assert_eq!(error.exit_code(), 1, "{line}: {error}");
            assert!(!error.to_string().contains('\n'), "{error}");
        }
        for name in ["blkholefs", "fuse.blkholefs", "blkholefs.x", "fuse.blkholefs.x"] {
            assert!(check_type(OsStr::new(name)).is_ok(), "{name}");
        }
        for name in ["", "fuse", "fuse.", "blkholefs2", "xblkholefs", "fuse.fuse.blkholefs"] {
            assert!(check_type(OsStr::new(name)).is_err(), "{name}");
        }
    }
}
