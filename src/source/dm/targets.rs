//! The layer of one target of a table, by the target's name.

use super::params;
use super::{copies, passing, snapshot};
use crate::map::{ExtentKind, Stripe, Uniform};
use crate::reason::DenseReason;
use crate::source::target::{TargetContext, TargetLayer};
use crate::source::{Layer, Resolver, dense, thin};
use crate::units::{Bytes, Sectors};

/// The layer of a target of the device `name`. Dense, with the reason, where its holes are not known.
pub fn layer(name: &str, context: &TargetContext<'_>, resolver: &mut Resolver<'_>) -> Layer {
    let kind = format!("dm-{}", context.target.kind);
    match target_layer(context, resolver) {
        Ok(TargetLayer { holes_from, map, below }) => {
            Layer { name: name.to_owned(), kind, holes_from, map, device: None, below }
        }
        Err(reason) => {
            let reason = reason.of_kind(&kind);
            dense::layer(name, kind, context.len, reason)
        }
    }
}

fn target_layer(context: &TargetContext<'_>, resolver: &mut Resolver<'_>) -> Result<TargetLayer, DenseReason> {
    match context.target.kind.as_str() {
        "linear" => context.mapped_to(context.params(params::linear)?, "the device it maps to", resolver),
        "striped" => striped(context, resolver),
        "zero" => {
            let zeros = Uniform { len: context.len, kind: ExtentKind::Hole };
            Ok(TargetLayer::new("it reads as zeros", zeros, Vec::new()))
        }
        "thin" => thin::volume::layer(context, resolver),
        "delay" => passing::delay(context, resolver),
        "flakey" => passing::flakey(context, resolver),
        "unstriped" => passing::unstriped(context, resolver),
        "snapshot-origin" => passing::snapshot_origin(context, resolver),
        "era" => passing::era(context, resolver),
        "multipath" => passing::multipath(context, resolver),
        "mirror" => copies::mirror(context, resolver),
        "raid" => copies::raid(context, resolver),
        "clone" => copies::clone(context, resolver),
        "snapshot" => snapshot::layer(context, resolver),
        other => Err(unsupported(other).into()),
    }
}

/// Why a target has no holes, whatever its lower devices have.
fn unsupported(kind: &str) -> &'static str {
    match kind {
        "error" => "it has no bytes, only errors",
        "crypt" => "zeros below are not zeros when they are deciphered",
        "integrity" => "zeros below have no valid tags, and are errors",
        "verity" => "what is read is checked against a hash tree, and may be an error",
        "cache" => "blocks are read from the cache or the origin, and only its metadata shows from which",
        "writecache" => "what was written may be in the cache only",
        "vdo" => "it does not report which blocks are mapped",
        _ => "holes below are not known to read as zeros",
    }
}

/// Striped: chunks are distributed over the legs in turn.
fn striped(context: &TargetContext<'_>, resolver: &mut Resolver<'_>) -> Result<TargetLayer, DenseReason> {
    let striped = context.params(params::striped)?;
    let leg_len = leg_len(&striped, context.len).ok_or("its length is no multiple of its stripes")?;
    let windows = striped.legs.iter().map(|place| (place.device, place.start, leg_len));
    let (below, legs) = resolver.windows(windows).ok_or("a leg is out of range")?;
    let chunk = striped.chunk.bytes().ok_or("its chunks are out of range")?;
    let map = Stripe::new(legs, chunk, context.len).ok_or("it has no stripes")?;
    Ok(TargetLayer::new("the legs it stripes over", map, below))
}

/// The length of each leg; `None` when `len` is not a multiple of one chunk on each leg, which `stripe_ctr` of
/// `drivers/md/dm-stripe.c` refuses.
fn leg_len(striped: &params::Striped, len: Bytes) -> Option<Bytes> {
    let count = u64::try_from(striped.legs.len()).ok()?;
    let row = striped.chunk.get().checked_mul(count)?;
    let sectors = len.get() / Sectors::SIZE.get();
    (sectors.checked_rem(row)? == 0).then(|| Bytes::new(len.get() / count))
}
