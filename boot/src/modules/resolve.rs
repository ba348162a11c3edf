//! From the parts of Linux that are wanted to modules in the order in which they can be loaded.
//!
//! What a module needs stands in itself (`depends=`, written by the kernel's build from the symbols that it uses).
//! Packages carry no `modules.dep`, which is made from the same by `depmod` when they are installed; so there is one
//! way for all.

use std::collections::BTreeMap;

use super::modinfo::ModInfo;
use super::tree::ModuleTree;
use super::wanted::{Need, Wanted};
use crate::error::{BootError, Missing, Result};

/// How deep modules may need each other: five levels are seen.
const MAX_DEPTH: usize = 64;

/// How large all chosen modules may be together: 11 MB are seen.
const MAX_TOTAL: usize = 256 << 20;

/// A module that was chosen.
#[derive(Debug)]
pub(crate) struct Selected {
    pub(crate) name: String,
    /// The decompressed file.
    pub(crate) content: Vec<u8>,
    /// The chosen modules that it needs directly.
    pub(crate) needs: Vec<String>,
    /// Names that the kernel may ask for it by.
    pub(crate) aliases: Vec<String>,
    /// Whether it is loaded at boot.
    pub(crate) at_boot: bool,
}

/// What was found for a list of wanted parts.
#[derive(Debug, Default)]
pub(crate) struct Resolved {
    /// In the order of loading: what a module needs stands before it, and what is loaded at boot before all else.
    pub(crate) modules: Vec<Selected>,
    /// Wanted parts that the kernel has built in.
    pub(crate) builtin: Vec<&'static str>,
    /// Wanted parts that are nowhere, and without which machines do with less.
    pub(crate) absent: Vec<Missing>,
}

/// Chooses from `tree`, the modules of the kernel `version`.
pub(crate) fn resolve(tree: &ModuleTree, version: &str, wanted: &[Wanted]) -> Result<Resolved> {
    let mut walk =
        Walk { tree, version, states: BTreeMap::new(), path: Vec::new(), total: 0, out: Resolved::default() };
    let mut missing = Vec::new();
    for at_boot in [true, false] {
        for want in wanted.iter().filter(|want| (want.need == Need::Later) != at_boot) {
            if walk.visit(want.module, at_boot)? {
                continue;
            }
            let lacking = Missing { module: want.module, config: want.config };
            if tree.is_builtin(want.module) {
                walk.out.builtin.push(want.module);
            } else if want.need == Need::Always {
                missing.push(lacking);
            } else {
                walk.out.absent.push(lacking);
            }
        }
    }
    if missing.is_empty() { Ok(walk.out) } else { Err(BootError::Lacks { version: version.into(), missing }) }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Under,
    Done,
}

/// A walk over modules, each after what it needs.
struct Walk<'a> {
    tree: &'a ModuleTree,
    version: &'a str,
    states: BTreeMap<String, State>,
    path: Vec<String>,
    total: usize,
    out: Resolved,
}

impl Walk<'_> {
    /// Chooses `name` and what it needs; false if there is no such module.
    fn visit(&mut self, name: &str, at_boot: bool) -> Result<bool> {
        match self.states.get(name) {
            Some(State::Done) => return Ok(true),
            Some(State::Under) => {
                let begin = self.path.iter().position(|on_path| on_path == name).unwrap_or(0);
                return Err(BootError::Circle { modules: self.path[begin..].to_vec() });
            }
            None => {}
        }
        let Some(content) = self.tree.load(name)? else { return Ok(false) };
        let file = self.tree.file(name).unwrap_or(std::path::Path::new(name));
        let info = ModInfo::read(&content, file)?;
        if info.kernel != self.version {
            let reason = format!("it is for the kernel {}, not for {}", info.kernel, self.version);
            return Err(BootError::BadModule { path: file.into(), reason });
        }
        self.total += content.len();
        if self.path.len() >= MAX_DEPTH || self.total > MAX_TOTAL {
            let reason = "the modules that are needed with it are too many or too large".into();
            return Err(BootError::BadModule { path: file.into(), reason });
        }
        self.states.insert(name.into(), State::Under);
        self.path.push(name.into());
        let mut needs = Vec::new();
        for needed in &info.depends {
            if self.visit(needed, at_boot)? {
                needs.push(needed.clone());
            } else if !self.tree.is_builtin(needed) {
                return Err(BootError::Incomplete {
                    version: self.version.into(),
                    module: name.into(),
                    needs: needed.clone(),
                });
            }
        }
        for wished in &info.wants {
            // Of the implementations of an algorithm, the one that every processor can run.
            for candidate in [wished.clone(), format!("{wished}_generic")] {
                if self.states.get(&candidate) != Some(&State::Under) && self.visit(&candidate, at_boot)? {
                    needs.push(candidate);
                    break;
                }
            }
        }
        self.path.pop();
        self.states.insert(name.into(), State::Done);
        self.out.modules.push(Selected { name: name.into(), content, needs, aliases: info.aliases, at_boot });
        Ok(true)
    }
}
