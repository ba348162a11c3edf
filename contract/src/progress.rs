//! How a room that takes long tells what it is doing, without printing.

/// One of the things that go on side by side in an operation: a layer being pulled, say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StepId(pub u64);

/// What a step is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What is being worked on, short enough for a column: a digest's first 12 digits, a path.
    pub name: String,
    /// What is being done with it: `pull`, `push`, `unpack`.
    pub verb: &'static str,
    /// How many bytes there are in all, where that is known.
    pub total: Option<u64>,
}

/// Takes news of a long operation. All methods may be called from several threads.
pub trait Progress: Send + Sync {
    /// A step begins.
    fn begin(&self, step: Step) -> StepId;
    /// `bytes` more are done. Negative when a retry starts over.
    fn advance(&self, step: StepId, bytes: i64);
    /// The step has ended; `outcome` is a word or two, such as `done`, `exists`.
    fn end(&self, step: StepId, outcome: &str);
    /// Something that the user should know and that is no error.
    fn note(&self, text: &str);
}

/// Tells nobody.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _: Step) -> StepId {
        StepId(0)
    }

    fn advance(&self, _: StepId, _: i64) {}

    fn end(&self, _: StepId, _: &str) {}

    fn note(&self, _: &str) {}
}
