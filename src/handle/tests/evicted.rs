//! Two devices whose extents do not fit in the memory together.

use super::*;

/// What `lseek` answers from the extents, and where all is data.
const EXACT: Option<Bytes> = Some(BLOCK);
const ALL_DATA: Option<Bytes> = Some(Bytes::ZERO);

/// A device, and what was done for it.
struct Device {
    handle: Handle,
    counters: Arc<Counters>,
}

impl Device {
    fn new(maps: &Arc<MapCache>) -> Self {
        let (handle, counters) = handle(maps, Ok(()));
        Self { handle, counters }
    }

    /// The first data.
    fn ask(&self) -> Option<Bytes> {
        self.handle.seek(Bytes::ZERO, Whence::Data).unwrap()
    }

    fn loads(&self) -> usize {
        self.counters.loads()
    }

    fn warned(&self) -> bool {
        self.handle.logged_evicted.load(Ordering::Relaxed)
    }

    /// Lets the requests have waited for as long as they may.
    fn exhaust_waits(&self) {
        let now = self.handle.maps.clock.now();
        let mut waits = self.handle.resolving.lock().unwrap();
        let step = Duration::from_millis(1);
        while waits.take(step, now) {}
    }
}

/// A limit with room for the extents of one device, and two devices.
fn room_for_one() -> (Arc<MapCache>, Device, Device) {
    let maps = cache(Some(memory_of_one().saturating_add(Bytes::new(1))));
    let [first, second] = [(); 2].map(|()| Device::new(&maps));
    (maps, first, second)
}

fn memory_of_one() -> Bytes {
    let maps = cache(None);
    let device = Device::new(&maps);
    device.ask();
    maps.used()
}

#[test]
fn of_two_maps_that_are_asked_in_turn_one_stays_and_the_other_is_read_for_a_tenth_of_the_time() {
    let (maps, first, second) = room_for_one();
    let mut exact = 0;
    for _ in 0..10_000 {
        assert_eq!(first.ask(), EXACT);
        let answer = second.ask();
        assert!(answer == EXACT || answer == ALL_DATA);
        exact += usize::from(answer == EXACT);
        assert_eq!(maps.used(), memory_of_one(), "one map is kept, within the limit");
        maps.clock.sleep(Duration::from_millis(1));
    }
    assert_eq!((first.loads(), exact), (1, second.loads()));
    let tenth = maps.clock.now() / 10;
    let reading = COST * u32::try_from(second.loads()).unwrap();
    assert!(reading <= tenth + COST, "{reading:?} of {:?}", maps.clock.now());
    assert!(reading >= tenth / 2, "{reading:?} of {:?}", maps.clock.now());
    assert!(second.warned() && !first.warned());
}

#[test]
fn a_map_that_is_used_stays_however_long_ago_it_was_loaded() {
    let maps = cache(Some(memory_of_one().saturating_add(memory_of_one())));
    let [old, unused, new] = [(); 3].map(|()| Device::new(&maps));
    old.ask();
    unused.ask();
    maps.clock.sleep(100 * COST);
    assert_eq!((old.ask(), new.ask()), (EXACT, EXACT));
    assert_eq!((old.ask(), new.ask()), (EXACT, EXACT));
    assert_eq!((old.loads(), unused.loads(), new.loads()), (1, 1, 1));
    assert_eq!((unused.ask(), unused.loads()), (EXACT, 2));
}

#[test]
fn a_map_that_is_no_longer_used_gives_way() {
    let (maps, first, second) = room_for_one();
    assert_eq!((first.ask(), second.ask(), first.ask()), (EXACT, EXACT, EXACT));
    maps.clock.sleep(10 * COST);
    for _ in 0..10 {
        assert_eq!(second.ask(), EXACT);
    }
    assert_eq!((first.loads(), second.loads()), (1, 2), "the first question found the other map in use");
    assert_eq!(maps.used(), memory_of_one());
}

#[test]
fn a_question_about_a_map_that_was_not_kept_waits_for_its_rest() {
    let (maps, first, second) = room_for_one();
    assert_eq!((first.ask(), second.ask()), (EXACT, EXACT));
    assert!(!second.warned(), "the map was not needed again");
    let before = maps.clock.now();
    assert_eq!((second.ask(), second.loads()), (EXACT, 2));
    assert_eq!(maps.clock.now() - before, 9 * COST + COST, "the rest and the load");
    assert!(second.warned());
}

#[test]
fn a_map_that_was_not_kept_is_all_data_in_its_rest_where_no_request_may_wait() {
    let (maps, first, second) = room_for_one();
    assert_eq!((first.ask(), second.ask()), (EXACT, EXACT));
    second.exhaust_waits();
    let (before, resolved) = (maps.clock.now(), second.counters.resolved());
    assert_eq!((second.ask(), second.ask()), (ALL_DATA, ALL_DATA));
    assert_eq!((maps.clock.now(), second.loads(), second.counters.resolved()), (before, 1, resolved), "costs nothing");
    assert!(second.warned() && !second.handle.logged_busy.load(Ordering::Relaxed));
    let degraded = second.handle.state().0.dense;
    assert_eq!((degraded.len(), &*degraded[0].layer, degraded[0].is_degraded), (1, "counting", true));
    assert!(degraded[0].reason.contains("does not fit in map_cache"), "{degraded:?}");
    maps.clock.sleep(9 * COST);
    assert_eq!((second.ask(), second.loads()), (EXACT, 2));
    assert_eq!(second.handle.state().0.dense, [], "the last answer was exact");
}

#[test]
fn a_stat_in_the_rest_of_a_map_neither_waits_nor_loads_it() {
    let (maps, first, second) = room_for_one();
    assert_eq!((first.ask(), second.ask()), (EXACT, EXACT));
    second.exhaust_waits();
    let before = maps.clock.now();
    for _ in 0..10 {
        assert!(second.handle.has_hole().unwrap());
        assert_eq!((second.handle.allocated(), second.handle.trace().is_some()), (Some(BLOCK), true));
        assert_eq!(second.ask(), ALL_DATA, "the description of the stack gives no right to load it");
    }
    assert_eq!((maps.clock.now(), second.loads(), second.counters.resolved()), (before, 1, 2), "resolved once more");
    maps.clock.sleep(9 * COST);
    assert_eq!((second.ask(), second.loads()), (EXACT, 2));
}

#[test]
fn maps_that_the_user_drops_may_be_read_at_once() {
    let (maps, first, second) = room_for_one();
    assert_eq!((first.ask(), second.ask()), (EXACT, EXACT));
    [&first, &second].iter().for_each(|device| drop(device.handle.drop_map()));
    let before = maps.clock.now();
    assert_eq!((second.ask(), second.loads()), (EXACT, 2));
    assert_eq!(maps.clock.now() - before, COST);
    assert!(!second.warned());
}

#[test]
fn a_map_that_alone_exceeds_the_limit_is_kept_alone() {
    let maps = cache(Some(Bytes::ZERO));
    let [first, second] = [(); 2].map(|()| Device::new(&maps));
    for _ in 0..3 {
        assert_eq!((first.ask(), first.loads()), (EXACT, 1));
    }
    assert_eq!((second.ask(), maps.used()), (EXACT, memory_of_one()));
    maps.clock.sleep(10 * COST);
    assert_eq!((second.ask(), second.ask(), maps.used()), (EXACT, EXACT, memory_of_one()));
    assert_eq!((first.loads(), second.loads()), (1, 2));
}
