//! A reader that tells how far it is.

use std::io::{self, Read};

use kiln_contract::{Progress, Step, StepId};

/// Reads from another reader, and reports what was read as a step.
pub(crate) struct Counted<'a, R> {
    inner: R,
    progress: &'a dyn Progress,
    step: StepId,
}

impl<'a, R: Read> Counted<'a, R> {
    /// Begins a step that does `verb` with `name`, of `total` bytes. It ends when this is dropped.
    pub(crate) fn begin(
        inner: R,
        verb: &'static str,
        name: &str,
        total: u64,
        progress: &'a dyn Progress,
    ) -> Self {
        let step = progress.begin(Step { name: name.into(), verb, total: Some(total) });
        Self { inner, progress, step }
    }
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.progress.advance(self.step, read as i64);
        Ok(read)
    }
}

impl<R> Drop for Counted<'_, R> {
    fn drop(&mut self) {
        self.progress.end(self.step, "done");
    }
}
