//! What the terminal of the standard output can show.

use std::ffi::OsString;
use std::io::{self, IsTerminal};

use crate::report::Look;
use crate::sys::terminal;

/// The width of what is no terminal, where `COLUMNS` is not set.
const WIDTH: usize = 80;

/// The limits of a width: a narrower terminal wraps the lines, and a wider one shows a picture of this width.
const WIDTHS: (usize, usize) = (20, 1000);

/// What the standard output can show, from the terminal and the environment.
pub fn look(is_ascii: bool) -> Look {
    let stdout = io::stdout();
    let columns = terminal::columns(&stdout).map(usize::from);
    of(is_ascii, stdout.is_terminal(), columns, |name| std::env::var_os(name))
}

/// The same from a width, which a terminal has, and the variables of an environment.
fn of(is_ascii: bool, is_terminal: bool, columns: Option<usize>, variable: impl Fn(&str) -> Option<OsString>) -> Look {
    let text =
        |name: &str| variable(name).map(|value| value.to_string_lossy().into_owned()).filter(|value| !value.is_empty());
    let columns = columns.or_else(|| text("COLUMNS")?.parse().ok().filter(|columns| *columns > 0)).unwrap_or(WIDTH);
    // The first of these three that is set and not empty (locale(7)).
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(text).unwrap_or_default().to_ascii_lowercase();
    let is_capable = text("TERM").is_some_and(|terminal| terminal != "dumb");
    Look {
        columns: columns.clamp(WIDTHS.0, WIDTHS.1),
        has_unicode: !is_ascii && (locale.contains("utf-8") || locale.contains("utf8")),
        // https://no-color.org: set, and not empty.
        has_colours: !is_ascii && is_terminal && is_capable && text("NO_COLOR").is_none(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const XTERM: &[(&str, &str)] = &[("TERM", "xterm"), ("LANG", "C.UTF-8")];

    fn look(is_terminal: bool, columns: Option<usize>, variables: &[(&str, &str)]) -> Look {
        let variables = [XTERM, variables].concat();
        of(false, is_terminal, columns, |name| variables.iter().rev().find(|it| it.0 == name).map(|it| it.1.into()))
    }

    #[test]
    fn colours_are_for_terminals_that_have_them() {
        assert!(look(true, None, &[]).has_colours && look(true, None, &[("NO_COLOR", "")]).has_colours);
        assert!(!look(false, None, &[]).has_colours);
        for variable in [("NO_COLOR", "1"), ("TERM", "dumb"), ("TERM", "")] {
            assert!(!look(true, None, &[variable]).has_colours, "{variable:?}");
        }
        assert!(!of(true, true, None, |name| (name == "TERM").then(|| "xterm".into())).has_colours, "--ascii");
    }

    #[test]
    fn the_locale_says_whether_there_are_block_characters() {
        for (variables, expected) in [
            (&[][..], true),
            (&[("LANG", "de_DE.utf8")], true),
            (&[("LANG", "de_DE")], false),
            (&[("LC_CTYPE", "C")], false),
            (&[("LC_CTYPE", "")], true),
            (&[("LC_ALL", "C"), ("LC_CTYPE", "C.UTF-8")], false),
            (&[("LC_ALL", "C.UTF-8"), ("LC_CTYPE", "C")], true),
            (&[("LANG", "")], false),
        ] {
            assert_eq!(look(true, None, variables).has_unicode, expected, "{variables:?}");
        }
        assert!(!of(true, true, None, |name| (name == "LANG").then(|| "C.UTF-8".into())).has_unicode, "--ascii");
    }

    #[test]
    fn the_width_of_the_terminal_is_first() {
        assert_eq!(look(true, Some(132), &[("COLUMNS", "100")]).columns, 132);
        assert_eq!(look(false, None, &[("COLUMNS", "100")]).columns, 100);
        for useless in ["", "0", "-1", "x"] {
            assert_eq!(look(false, None, &[("COLUMNS", useless)]).columns, 80, "{useless}");
        }
        assert_eq!((look(true, Some(1), &[]).columns, look(true, Some(60_000), &[]).columns), WIDTHS);
    }
}
