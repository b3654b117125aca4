//! The times that states get, without devices.

use tempfile::TempDir;

use super::store::NAME as TIMES_FILE;
use super::*;
use crate::source::Reach;

const DEVICE: DeviceId = DeviceId { major: 7, minor: 0 };

/// A process whose store is in a directory. `None`: it has none.
fn process(directory: Option<&TempDir>) -> Known {
    let store = directory.map(|directory| TimesStore::new(directory.path()).unwrap());
    Known { devices: HashMap::new(), store }
}

fn state(number: u128) -> Option<DeviceState> {
    Some(DeviceState::new(number, Reach::Boot, None))
}

/// The state of a loop device that is all of a file, which was changed at that time.
fn of_file(number: u128, changed: SystemTime) -> Option<DeviceState> {
    Some(DeviceState::new(number, Reach::Boot, Some(changed)))
}

fn ago(seconds: u64) -> SystemTime {
    SystemTime::now() - Duration::from_secs(seconds)
}

#[test]
fn a_state_has_the_same_times_in_each_process() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = process(Some(&dir));
    let times = first.times(DEVICE, state(1));
    assert_eq!(first.times(DEVICE, state(1)), times);
    // A process that is killed drops nothing.
    std::mem::forget(first);
    let [mut second, mut third] = [0; 2].map(|_| process(Some(&dir)));
    assert_eq!((second.times(DEVICE, state(1)), third.times(DEVICE, state(1))), (times, times));
    let later = second.times(DEVICE, state(2));
    assert!(later.mtime > times.mtime && later.ctime > times.ctime);
    assert_eq!(third.times(DEVICE, state(2)), later, "of two processes that look at the same time");
    let other = DeviceId { minor: 1, ..DEVICE };
    assert_ne!(second.times(other, state(2)), later, "another device");
}

#[test]
fn what_proves_nothing_is_never_found() {
    let dir = tempfile::tempdir().unwrap();
    let of_process = Some(DeviceState::new(1, Reach::Process, None));
    let mut first = process(Some(&dir));
    let times = first.times(DEVICE, of_process);
    assert_eq!(first.times(DEVICE, of_process), times);
    drop(first);
    let mut second = process(Some(&dir));
    let later = second.times(DEVICE, of_process);
    assert!(later.mtime > times.mtime);
    let unknown = second.times(DEVICE, None);
    assert!(unknown.mtime > later.mtime && second.times(DEVICE, None).mtime > unknown.mtime);
}

#[test]
fn times_increase_when_the_clock_is_set_back() {
    let dir = tempfile::tempdir().unwrap();
    let ahead = SystemTime::now() + Duration::from_secs(1000);
    let record = Record { state: Some(1), times: FileTimes::at(ahead) };
    TimesStore::new(dir.path()).unwrap().put(&[(DEVICE, record)]).unwrap();
    let mut known = process(Some(&dir));
    let next = known.times(DEVICE, state(2));
    assert_eq!(next, FileTimes::at(ahead + Duration::from_nanos(1)));
    assert!(known.times(DEVICE, state(3)).mtime > next.mtime);
    drop(known);
    assert!(process(Some(&dir)).times(DEVICE, None).mtime > next.mtime, "a state that is not known");
}

#[test]
fn all_of_a_file_has_the_time_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let [oldest, old, new] = [3000, 2000, 1000].map(ago);
    let mut known = process(Some(&dir));
    let times = known.times(DEVICE, of_file(1, old));
    assert_eq!(times.mtime, old);
    assert!(times.ctime > ago(100), "the time at which the state was first seen");
    drop(known);
    let mut known = process(Some(&dir));
    assert_eq!(known.times(DEVICE, of_file(1, old)), times);
    drop(known);
    // The device is bound to other files while it is not mounted.
    for (number, changed, is_used) in [(2, new, true), (3, oldest, false), (4, new, false), (5, ago(0), false)] {
        let mut known = process(Some(&dir));
        let before = known.store.as_mut().unwrap().get(DEVICE).unwrap().times;
        let times = known.times(DEVICE, of_file(number, changed));
        assert_eq!(times.mtime == changed, is_used, "{number}");
        assert!(times.mtime > before.mtime && times.ctime > before.ctime, "{number}: {times:?}");
    }
}

#[test]
fn two_files_of_one_time_have_two_times() {
    let dir = tempfile::tempdir().unwrap();
    let changed = ago(1000);
    let first = process(Some(&dir)).times(DEVICE, of_file(1, changed));
    let second = process(Some(&dir)).times(DEVICE, of_file(2, changed));
    assert_eq!(first.mtime, changed);
    assert!(second.mtime > first.mtime);
}

/// Without a store, another file of the same time could be shown before.
#[test]
fn without_a_store_each_process_gives_new_times() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join(TIMES_FILE)).unwrap();
    for mut known in [process(None), process(Some(&dir))] {
        let state = of_file(1, ago(1000));
        let times = known.times(DEVICE, state);
        assert!(times.mtime > ago(100) && times.mtime == times.ctime);
        assert_eq!(known.times(DEVICE, state), times);
    }
}

#[test]
fn a_device_that_changes_all_the_time_is_written_once_in_a_while_and_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(TIMES_FILE);
    let content = || std::fs::read(&path).unwrap();
    let mut known = process(Some(&dir));
    let first = known.times(DEVICE, state(0));
    let (begun, written) = (Instant::now(), content());
    let mut last = first;
    for number in 1..1000 {
        let times = known.times(DEVICE, state(number));
        assert!(times.mtime > last.mtime);
        last = times;
    }
    assert!(content() == written || begun.elapsed() >= SAVE_INTERVAL);
    drop(known);
    assert_eq!(process(Some(&dir)).times(DEVICE, state(999)), last);
    assert!(process(Some(&dir)).times(DEVICE, state(0)).mtime > last.mtime, "a state that is over");
}

#[test]
fn an_unchanged_device_is_not_looked_up() {
    let dir = tempfile::tempdir().unwrap();
    let mut known = process(Some(&dir));
    let times = known.times(DEVICE, state(1));
    std::fs::remove_file(dir.path().join(TIMES_FILE)).unwrap();
    assert_eq!(known.times(DEVICE, state(1)), times);
    assert!(!dir.path().join(TIMES_FILE).exists());
}
