//! Which writes a loss of the server, or of the connection to it, may have undone.
//!
//! A write that was answered may be in a cache of the server until it is flushed. Such a cache may be lost with the server, and
//! a connection that breaks may be the only sign of that. So these writes count as lost with their connection, and the next
//! flush of each writer fails.

/// The state of the writes to one export.
///
/// All of it is about the connection that was used last. An answer on another one counts as lost.
#[derive(Debug, Default)]
pub(super) struct Unflushed {
    /// The number of writes without an answer.
    unanswered: u64,
    /// The number of the connection that was used last.
    connection: u64,
    /// The number of writes that were answered on it and are not permanent by themselves.
    answered: u64,
    /// How many of them a flush has made permanent.
    flushed: u64,
    /// How often writes may have been lost.
    losses: u64,
    /// The number of losses that were reported to some writer.
    reported: u64,
}

/// What one writer has reported, and what there was before it.
#[derive(Debug)]
pub(super) struct WriterState {
    /// The number of losses that it has reported to its user.
    losses: u64,
    /// The number of writes without an answer when it was opened.
    unanswered: u64,
}

impl Unflushed {
    /// The state of a new writer. Losses that no writer has reported are reported by it too, as fsync(2) does for a file.
    pub(super) fn open(&self) -> WriterState {
        WriterState { losses: self.reported, unanswered: self.unanswered }
    }

    /// The next request goes over the connection with that number. Returns the number of writes that were answered on it.
    ///
    /// # Errors
    ///
    /// Why the writer cannot write any more.
    pub(super) fn begin(&mut self, writer: &WriterState, connection: u64) -> Result<u64, String> {
        if self.has_ended(writer) {
            return Err("an earlier write had no answer, so that its effect is unknown".to_owned());
        }
        if self.connection != connection {
            if self.answered > self.flushed {
                self.losses += 1;
            }
            (self.connection, self.answered, self.flushed) = (connection, 0, 0);
        }
        Ok(self.answered)
    }

    /// Whether the writer cannot write any more: a write had no answer since it was opened.
    pub(super) fn has_ended(&self, writer: &WriterState) -> bool {
        self.unanswered > writer.unanswered
    }

    /// A write was answered on that connection.
    pub(super) fn answer(&mut self, connection: u64) {
        if self.connection == connection {
            self.answered += 1;
        } else {
            self.losses += 1;
        }
    }

    /// A write was sent and has no answer. The server may execute it at any later time, also after a write that follows. So the
    /// writers that are open now write nothing else.
    pub(super) fn fail(&mut self) {
        self.unanswered += 1;
    }

    /// The first `count` writes on that connection are permanent.
    pub(super) fn flush(&mut self, connection: u64, count: u64) {
        if self.connection == connection {
            self.flushed = self.flushed.max(count);
        }
    }

    /// The server could not make the first `count` writes on that connection permanent. It may have dropped them, and report
    /// that only once.
    pub(super) fn lose(&mut self, connection: u64, count: u64) {
        self.losses += 1;
        self.flush(connection, count);
    }

    /// Whether there was a loss that the writer has not reported. It counts as reported from now on.
    pub(super) fn report(&mut self, writer: &mut WriterState) -> bool {
        let is_new = self.losses > writer.losses;
        writer.losses = self.losses;
        self.reported = self.reported.max(self.losses);
        is_new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_that_were_not_flushed_are_lost_with_their_connection() {
        let mut state = Unflushed::default();
        let (mut first, mut second) = (state.open(), state.open());
        for connection in [1, 2] {
            state.begin(&first, connection).unwrap();
            assert!(!state.report(&mut first), "nothing was written before");
        }
        state.answer(2);
        let count = state.begin(&first, 2).unwrap();
        state.flush(2, count);
        state.begin(&first, 3).unwrap();
        assert!(!state.report(&mut first), "all was flushed");
        state.answer(3);
        state.begin(&first, 4).unwrap();
        assert!(state.report(&mut first) && !state.report(&mut first));
        let mut third = state.open();
        assert!(!state.report(&mut third), "another writer has reported it");
        assert!(state.report(&mut second) && !state.report(&mut second));
    }

    #[test]
    fn a_flush_covers_what_was_answered_before_it_on_its_connection() {
        let mut state = Unflushed::default();
        let mut writer = state.open();
        state.begin(&writer, 1).unwrap();
        state.answer(1);
        let count = state.begin(&writer, 1).unwrap();
        state.answer(1);
        state.flush(1, count);
        state.begin(&writer, 2).unwrap();
        assert!(state.report(&mut writer), "the second write was answered after the flush was sent");
        state.answer(2);
        state.flush(1, 1);
        state.begin(&writer, 3).unwrap();
        assert!(state.report(&mut writer), "a flush of another connection covers nothing");
    }

    #[test]
    fn an_answer_on_a_connection_that_was_replaced_is_a_loss() {
        let mut state = Unflushed::default();
        let mut writer = state.open();
        state.begin(&writer, 1).unwrap();
        state.begin(&writer, 2).unwrap();
        state.answer(1);
        assert!(state.report(&mut writer));
    }

    #[test]
    fn a_flush_that_fails_is_reported_by_each_writer() {
        let mut state = Unflushed::default();
        let (mut first, mut second) = (state.open(), state.open());
        state.begin(&first, 1).unwrap();
        state.answer(1);
        let count = state.begin(&first, 1).unwrap();
        state.lose(1, count);
        assert!(state.report(&mut first) && state.report(&mut second));
        state.begin(&first, 2).unwrap();
        assert!(!state.report(&mut first), "it was reported");
        let count = state.begin(&first, 2).unwrap();
        state.answer(2);
        state.lose(2, count);
        assert!(state.report(&mut first));
        state.begin(&first, 3).unwrap();
        assert!(state.report(&mut first), "the flush that failed did not cover the last write");
    }

    #[test]
    fn a_loss_that_nobody_has_reported_is_reported_by_the_next_writer() {
        let mut state = Unflushed::default();
        let first = state.open();
        state.begin(&first, 1).unwrap();
        state.answer(1);
        state.begin(&first, 2).unwrap();
        let mut later = state.open();
        assert!(state.report(&mut later));
    }

    #[test]
    fn a_write_without_an_answer_ends_the_writing_of_all_writers_that_are_open() {
        let mut state = Unflushed::default();
        let (first, second) = (state.open(), state.open());
        state.begin(&first, 1).unwrap();
        state.fail();
        assert!(state.begin(&first, 2).is_err() && state.begin(&second, 2).is_err());
        let third = state.open();
        assert_eq!(state.begin(&third, 2), Ok(0));
        assert!(state.begin(&first, 2).is_err());
    }
}
