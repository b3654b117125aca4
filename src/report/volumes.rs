//! The volumes of a thin pool that is not active, as text and as JSON.

use super::{human, quoted};
use crate::map::HoleMap;
use crate::source::thin::offline::Found;
use crate::units::Bytes;

/// The volumes of an offline pool, one on each line; for a damaged volume, the damage. Reads all of their mapping trees.
pub fn volumes(found: &[Found]) -> String {
    let line = |found: &Found| match volume_sizes(found) {
        Ok((len, data)) => format!("volume {}  thin, {}, {} of it data\n", found.id, human(len), human(data)),
        Err(damage) => format!("volume {}  damaged: {damage}\n", found.id),
    };
    found.iter().map(line).collect()
}

/// The volumes of an offline pool as JSON: `[{"volume","size","data"}]`, or `{"volume","damaged"}` for a damaged volume.
pub fn volumes_json(found: &[Found]) -> String {
    let object = |found: &Found| match volume_sizes(found) {
        Ok((len, data)) => format!("{{ \"volume\": {}, \"size\": {len}, \"data\": {data}}}", found.id),
        Err(damage) => format!("{{ \"volume\": {}, \"damaged\": {}}}", found.id, quoted(&damage)),
    };
    let objects: Vec<_> = found.iter().map(object).collect();
    format!("[{}]\n", objects.join(",\n"))
}

/// The length of a volume and its bytes of data.
///
/// # Errors
/// The damage.
fn volume_sizes(found: &Found) -> Result<(Bytes, Bytes), String> {
    let volume = found.volume.as_ref().map_err(ToString::to_string)?;
    let map = volume.map().map_err(|error| error.to_string())?;
    Ok((volume.len(), map.allocated().unwrap_or(volume.len())))
}
