//! The layers of a device, as a tree of text and as JSON.

use std::fmt::Write as _;

use super::{human, quoted};
use crate::map::view;
use crate::source::{Layer, Stack};
use crate::units::Bytes;

/// A stack as a tree of text: the name, kind and length of each layer, and where its holes come from or why it has none.
pub fn tree(stack: &Stack) -> String {
    let loaded = stack.load();
    let sparse = view::has_hole(loaded.map(), Bytes::new(4096));
    let mut text = String::new();
    branch(&stack.top, "", "", &mut text);
    let verdict = match (loaded.map().dense_because(), sparse) {
        (Some(reason), _) => format!("dense: {reason}"),
        (None, true) => "has holes".to_owned(),
        (None, false) => "has no holes now".to_owned(),
    };
    let _ = writeln!(text, "{verdict}");
    text
}

fn branch(layer: &Layer, lead: &str, below_lead: &str, text: &mut String) {
    let holes = holes(layer);
    let _ = writeln!(text, "{lead}{}  {}, {}, {holes}", layer.name, layer.kind, human(layer.len()));
    for (index, below) in layer.below.iter().enumerate() {
        let last = index + 1 == layer.below.len();
        let (tick, rest) = if last { ("`- ", "   ") } else { ("|- ", "|  ") };
        branch(below, &format!("{below_lead}{tick}"), &format!("{below_lead}{rest}"), text);
    }
}

/// Where the holes of a layer come from, or why it has none.
fn holes(layer: &Layer) -> String {
    match layer.map.dense_because() {
        Some(reason) => format!("dense: {reason}"),
        None => format!("holes: {}", layer.holes_from),
    }
}

/// A stack as JSON: `{"name","kind","size","holes-from","dense-because","below":[...]}`.
pub fn json(stack: &Stack) -> String {
    format!("{{ {}}}\n", json_fields(stack))
}

/// The fields of that object, for an object that has further ones.
pub fn json_fields(stack: &Stack) -> String {
    let loaded = stack.load();
    let sparse = view::has_hole(loaded.map(), Bytes::new(4096));
    let mut text = String::new();
    json_layer(&stack.top, Some(sparse), &mut text);
    text
}

/// Appends the fields of the object of a layer.
fn json_layer(layer: &Layer, sparse: Option<bool>, text: &mut String) {
    let dense = layer.map.dense_because().map(|reason| reason.to_string());
    let _ = write!(
        text,
        "\"name\": {}, \"kind\": {}, \"size\": {}, \"holes-from\": {}, \"dense-because\": {}",
        quoted(&layer.name),
        quoted(&layer.kind),
        layer.len(),
        if dense.is_some() { "null".to_owned() } else { quoted(&layer.holes_from) },
        dense.as_deref().map_or("null".to_owned(), quoted),
    );
    if let Some(sparse) = sparse {
        let _ = write!(text, ", \"has-holes\": {sparse}");
    }
    text.push_str(", \"below\": [");
    for (index, below) in layer.below.iter().enumerate() {
        text.push_str(if index == 0 { "{ " } else { ", { " });
        json_layer(below, None, text);
        text.push('}');
    }
    text.push(']');
}
