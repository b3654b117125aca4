//! Maps of devices that are asked once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use super::*;

const LIMIT: Bytes = Bytes::new(64 << 20);
/// The length of a device.
const SMALL: u64 = 2 << 30;
/// Every other extent of this length is a hole, the first one too.
const EXTENT: u64 = 3 << 20;

/// A device with regular extents, which counts its queries.
struct CountingDevice {
    name: &'static str,
    len: u64,
    longest: Option<Bytes>,
    /// The number of extents that an answer has at most.
    most: usize,
    medium: u64,
    state: Arc<DeviceState>,
}

/// The state that a test changes and looks at.
#[derive(Default)]
struct DeviceState {
    /// The calls of the source, each of which is a round trip.
    calls: AtomicUsize,
    queries: AtomicUsize,
    writes: AtomicU64,
    fails: AtomicBool,
    /// Whether the whole device is data.
    is_full: AtomicBool,
    no_counters: AtomicBool,
    unobserved: AtomicBool,
}

impl DeviceState {
    fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }
}

impl CountingDevice {
    fn new() -> Self {
        let state = Arc::default();
        Self { name: "counting", len: SMALL, longest: Some(Bytes::MAX), most: usize::MAX, medium: 1, state }
    }

    fn answer(&self, range: &Range<Bytes>) -> Result<Vec<Extent>, QueryError> {
        self.state.queries.fetch_add(1, Ordering::Relaxed);
        if self.state.fails.load(Ordering::Relaxed) {
            return Err(QueryError::Ranges(error()));
        }
        let is_full = self.state.is_full.load(Ordering::Relaxed);
        let (mut extents, mut at) = (Vec::new(), range.start.get());
        while at < range.end.get() && extents.len() < self.most {
            let is_hole = (at / EXTENT).is_multiple_of(2) && !is_full;
            at = ((at / EXTENT + 1) * EXTENT).min(range.end.get());
            extents.push(extent(Bytes::new(at), if is_hole { ExtentKind::Hole } else { ExtentKind::Data }));
        }
        Ok(extents)
    }
}

impl LiveSource for CountingDevice {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn len(&self) -> Bytes {
        Bytes::new(self.len)
    }

    fn block(&self) -> Bytes {
        BLOCK
    }

    fn longest_query(&self) -> Option<Bytes> {
        self.longest
    }

    fn extents(&self, ranges: &[Range<Bytes>]) -> Result<Vec<Extent>, QueryError> {
        self.state.calls.fetch_add(1, Ordering::Relaxed);
        self.answer(&(ranges[0].start..ranges[ranges.len() - 1].end))
    }

    fn answers(&self, ranges: &[Range<Bytes>]) -> Vec<Result<Vec<Extent>, QueryError>> {
        self.state.calls.fetch_add(1, Ordering::Relaxed);
        assert!(ranges.len() <= 16, "{}", ranges.len());
        ranges.iter().map(|range| self.answer(range)).collect()
    }

    fn unusable(&self) -> Option<DenseReason> {
        None
    }

    fn counters(&self) -> Option<IoCounters> {
        let writes = self.state.writes.load(Ordering::Relaxed);
        (!self.state.no_counters.load(Ordering::Relaxed)).then(|| IoCounters { writes, ..IoCounters::default() })
    }

    fn medium(&self) -> Option<u64> {
        Some(self.medium)
    }

    fn unobserved(&self) -> Option<String> {
        self.state.unobserved.load(Ordering::Relaxed).then(|| "unobserved".to_owned())
    }
}

fn static_devices() -> StaticDevices {
    StaticDevices::new(LIMIT)
}

/// The extents of a map from `start` to its end: the start and the kind of each, neighbours merged.
fn walk(map: &dyn HoleMap) -> Vec<(u64, ExtentKind)> {
    let mut extents: Vec<(u64, ExtentKind)> = Vec::new();
    let mut at = Bytes::ZERO;
    while at < map.len() {
        let extent = map.extent_at(at);
        assert!(extent.end > at && extent.end <= map.len());
        if extents.last().is_none_or(|(_, kind)| *kind != extent.kind) {
            extents.push((at.get(), extent.kind));
        }
        at = extent.end;
    }
    extents
}

fn regular(len: u64) -> Vec<(u64, ExtentKind)> {
    let kind = |index: u64| if index.is_multiple_of(2) { ExtentKind::Hole } else { ExtentKind::Data };
    (0..len.div_ceil(EXTENT)).map(|index| (index * EXTENT, kind(index))).collect()
}

#[test]
fn a_static_device_is_asked_once_with_a_few_round_trips() {
    for (longest, round_trips) in [(Some(Bytes::MAX), 2), (Some(Bytes::new(256 << 20)), 2), (None, 1)] {
        let device = CountingDevice { longest, ..CountingDevice::new() };
        let state = device.state.clone();
        let map = LiveMap::new(device, Some(&static_devices()));
        for _ in 0..3 {
            assert_eq!(walk(&map), regular(SMALL));
        }
        assert_eq!(state.calls(), round_trips, "{longest:?}");
        let data = extent(Bytes::new(2 * EXTENT), ExtentKind::Data);
        assert_eq!(map.expected_extent(Bytes::new(EXTENT)), Some(data));
    }
}

#[test]
fn without_the_option_each_question_about_a_hole_asks() {
    let device = CountingDevice::new();
    let state = device.state.clone();
    let map = LiveMap::new(device, None);
    for calls in 1..4 {
        assert_eq!(map.extent_at(Bytes::ZERO).kind, ExtentKind::Hole);
        assert_eq!(state.calls(), calls);
    }
}

#[test]
fn a_huge_device_is_asked_only_as_far_as_questions_go() {
    let len = 100 << 40;
    let longest = Some(Bytes::new((4 << 30) - (64 << 10)));
    let device = CountingDevice { longest, len, ..CountingDevice::new() };
    let state = device.state.clone();
    let map = LiveMap::new(device, Some(&static_devices()));
    for start in [0, len / 2, len - BLOCK.get()] {
        let before = state.queries.load(Ordering::Relaxed);
        map.extent_at(Bytes::new(start));
        assert!(state.queries.load(Ordering::Relaxed) - before <= 16);
    }
    assert_eq!(state.calls(), 3);
}

#[test]
fn a_device_with_one_extent_in_each_answer_is_asked_once_for_each_of_them() {
    let device = CountingDevice { most: 1, ..CountingDevice::new() };
    let state = device.state.clone();
    let map = LiveMap::new(device, Some(&static_devices()));
    for _ in 0..2 {
        assert_eq!(walk(&map), regular(SMALL));
        let (extents, queries) = (regular(SMALL).len(), state.queries.load(Ordering::Relaxed));
        assert!(queries <= 2 * extents, "{queries} for {extents} extents");
    }
}

#[test]
fn the_time_for_one_extent_is_limited_before_it_is_kept() {
    let map = LiveMap::new(CountingDevice::new(), Some(&static_devices()));
    map.spend_budget(Bytes::new(EXTENT), ExtentKind::Data);
    let spent = map.extent_at(Bytes::new(EXTENT));
    assert_eq!((spent.kind, spent.end > Bytes::new(2 * EXTENT)), (ExtentKind::Data, true));
    assert_eq!(map.source.state.calls(), 0);
}

/// Counters that move, counters that are not complete or cannot be read: each ends the promise of the user.
#[test]
fn evidence_of_a_write_ends_the_option_for_the_rest_of_the_mount() {
    for change in 0..3 {
        let (device, devices) = (CountingDevice::new(), static_devices());
        let state = device.state.clone();
        let map = LiveMap::new(device, Some(&devices));
        assert_eq!(walk(&map), regular(SMALL));
        let asked = state.calls();
        state.is_full.store(true, Ordering::Relaxed);
        assert_eq!((walk(&map), state.calls()), (regular(SMALL), asked), "the user's word");
        match change {
            0 => drop(state.writes.fetch_add(1, Ordering::Relaxed)),
            1 => state.unobserved.store(true, Ordering::Relaxed),
            _ => state.no_counters.store(true, Ordering::Relaxed),
        }
        assert_eq!(walk(&map), [(0, ExtentKind::Data)], "change {change}");
        // What contradicted the promise does so for good.
        state.writes.store(0, Ordering::Relaxed);
        state.unobserved.store(false, Ordering::Relaxed);
        state.no_counters.store(false, Ordering::Relaxed);
        state.is_full.store(false, Ordering::Relaxed);
        assert_eq!(map.once.as_ref().map(AskedOnce::memory), Some(Bytes::ZERO), "nothing is kept");
        for map in [map, LiveMap::new(CountingDevice { state: state.clone(), ..CountingDevice::new() }, Some(&devices))]
        {
            map.remembered().refresh(None);
            let asked = state.calls();
            map.extent_at(Bytes::ZERO);
            map.extent_at(Bytes::ZERO);
            assert_eq!(state.calls(), asked + 2, "asked at each question");
        }
    }
}

#[test]
fn another_device_in_its_place_ends_the_option_and_other_names_keep_it() {
    let devices = static_devices();
    let asked_once = |device: CountingDevice| {
        let state = device.state.clone();
        let map = LiveMap::new(device, Some(&devices));
        map.extent_at(Bytes::ZERO);
        map.extent_at(Bytes::ZERO);
        state.calls() == 1
    };
    assert!(asked_once(CountingDevice::new()) && asked_once(CountingDevice::new()));
    assert!(!asked_once(CountingDevice { medium: 2, ..CountingDevice::new() }));
    assert!(asked_once(CountingDevice { name: "other", ..CountingDevice::new() }));
    assert!(!asked_once(CountingDevice { name: "other", len: SMALL / 2, ..CountingDevice::new() }));
    assert!(!asked_once(CountingDevice { name: "other", ..CountingDevice::new() }), "as at first");
}

/// So that a stat(2) needs no query after the first one.
#[test]
fn that_there_is_a_hole_is_known_to_all_stacks_until_the_option_ends() {
    let devices = static_devices();
    let map = |state: &Arc<DeviceState>| {
        LiveMap::new(CountingDevice { state: state.clone(), ..CountingDevice::new() }, Some(&devices))
    };
    let state = Arc::<DeviceState>::default();
    let (first, second) = (map(&state), map(&state));
    assert_eq!((first.is_sparse(), second.is_sparse()), (None, None));
    first.extent_at(Bytes::ZERO);
    assert_eq!((first.is_sparse(), second.is_sparse()), (Some(true), Some(true)));
    assert_eq!(state.calls(), 1);
    state.writes.store(1, Ordering::Relaxed);
    assert_eq!((first.is_sparse(), second.is_sparse()), (None, None));
}

#[test]
fn writes_before_the_first_question_are_no_change() {
    let device = CountingDevice::new();
    let state = device.state.clone();
    let map = LiveMap::new(device, Some(&static_devices()));
    map.probe().unwrap();
    state.writes.store(5, Ordering::Relaxed);
    assert_eq!((walk(&map), walk(&map)), (regular(SMALL), regular(SMALL)));
    assert_eq!(state.calls(), 3, "the probe and two calls");
}

#[test]
fn a_failed_query_is_data_and_asked_again() {
    let device = CountingDevice::new();
    let state = device.state.clone();
    state.fails.store(true, Ordering::Relaxed);
    let map = LiveMap::new(device, Some(&static_devices()));
    assert_eq!(map.extent_at(Bytes::ZERO), extent(FIRST, ExtentKind::Data));
    assert_eq!(map.extent_at(Bytes::ZERO), extent(FIRST, ExtentKind::Data), "remembered");
    state.fails.store(false, Ordering::Relaxed);
    map.remembered().refresh(None);
    assert_eq!(map.extent_at(Bytes::ZERO), extent(Bytes::new(EXTENT), ExtentKind::Hole));
}

#[test]
fn the_memory_is_counted_and_what_exceeds_the_limit_is_asked_again() {
    let devices = StaticDevices::new(Bytes::new(1000));
    let device = CountingDevice { longest: Some(Bytes::new(64 << 20)), ..CountingDevice::new() };
    let state = device.state.clone();
    let map = LiveMap::new(device, Some(&devices));
    let changes = devices.changes();
    assert_eq!(walk(&map), regular(SMALL));
    assert!(map.memory() > Bytes::ZERO && devices.changes() > changes);
    assert!(map.once.as_ref().unwrap().memory() <= Bytes::new(1000));
    let asked = state.calls();
    assert_eq!(walk(&map), regular(SMALL));
    assert!(state.calls() > asked, "dropped windows are asked again");
}

#[test]
fn questions_at_the_same_time_ask_once() {
    let device = CountingDevice::new();
    let state = device.state.clone();
    let map = LiveMap::new(device, Some(&static_devices()));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(map.extent_at(Bytes::ZERO).kind, ExtentKind::Hole));
        }
    });
    assert_eq!(state.calls(), 1);
}
