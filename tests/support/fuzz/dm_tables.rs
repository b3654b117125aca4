//! Device-mapper's replies, the arguments and status lines of targets, and the stores of snapshots.
//!
//! Invariant: no input makes a parser panic, loop, or allocate more than the size of the input allows. A table has at most as
//! many targets as target headers fit into the reply. A target has at most as many legs or paths as words. An area of a store
//! has at most as many exceptions as entries.

use blkholefs::testing::source::dm::{exceptions, params};
use blkholefs::testing::sys::dm::Table;
use blkholefs::testing::units::Sectors;

pub fn run(input: &[u8]) {
    if let Some(table) = Table::parse(input) {
        assert!(table.targets.len() <= input.len() / 40 + 1);
    }
    let text = String::from_utf8_lossy(input);
    let _ = params::linear(&text);
    if let Some(striped) = params::striped(&text) {
        assert!(!striped.legs.is_empty() && striped.legs.len() <= text.len() / 2);
        assert!(striped.chunk.get() > 0);
    }
    for legs in [params::mirror(&text), params::raid1(&text)].into_iter().flatten() {
        assert!(!legs.is_empty() && legs.len() <= text.len() / 2);
        let _ = params::mirror_is_in_sync(&text, legs.len()) || params::raid_is_in_sync(&text, legs.len());
    }
    assert!(params::multipath_paths(&text).is_none_or(|paths| paths.len() <= text.len() / 2));
    assert!(params::unstriped(&text).is_none_or(|unstriped| unstriped.index < unstriped.stripes));
    let _ = (params::delay(&text), params::flakey_without_faults(&text), params::snapshot_origin(&text));
    let _ = (params::era_origin(&text), params::cloning(&text), params::clone_status(&text));
    let _ = (params::snapshot(&text), params::allocated(&text));
    assert!(exceptions::area(input).exceptions.len() <= input.len() / 16);
    for power in 0..19 {
        let layout = exceptions::StoreLayout::new(Sectors::new(1_u64 << power)).expect("a power of two");
        let _ = layout.is_header(input);
        if let Some(word) = input.first_chunk() {
            let number = u64::from_le_bytes(*word);
            let _ = (layout.area(number), layout.exceptions(Sectors::new(number)));
        }
    }
}
