//! Attaching to the root, walking from it, and letting fids go.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::AtFlags;
use rustix::io::Errno;

use crate::fid::{Fid, Place, State};
use crate::message::NONE;
use crate::node::Node;
use crate::session::Session;
use crate::share::Root;
use crate::wire::{MOST_NAMES, Names, Qid, Reply};

impl Session {
    pub(crate) fn attach(
        &self,
        fid: u32,
        auth: u32,
        tree: &[u8],
        user: u32,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        if auth != NONE {
            return Err(Errno::OPNOTSUPP);
        }
        if !matches!(tree, b"" | b"/") {
            return Err(Errno::NOENT);
        }
        let node = match &self.tree.root {
            Root::Directory(root) => Arc::clone(root),
            Root::File { .. } => Arc::new(Node::Around),
        };
        let qid = self.qid(&node)?;
        self.fids.insert(fid, Fid::new(node, None, (user != NONE).then_some(user)))?;
        reply.qid(qid);
        Ok(())
    }

    /// The qid of a node as it is now.
    pub(crate) fn qid(&self, node: &Node) -> Result<Qid, Errno> {
        match node {
            Node::Host(node) => self.tree.paths.qid(&node.stat()?),
            Node::Around => self.around_qid(),
        }
    }

    /// The directory around a single file changes as the file does, and has a number that no file has.
    pub(crate) fn around_qid(&self) -> Result<Qid, Errno> {
        let (_, stat) = self.tree.single()?;
        let file = self.tree.paths.qid(&stat)?;
        Ok(Qid { kind: Qid::DIRECTORY, version: file.version, path: u64::MAX >> 1 })
    }

    pub(crate) fn walk(&self, fid: u32, new: u32, names: Names<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let start = self.fids.get(fid)?;
        if fid != new && self.fids.has(new) {
            return Err(Errno::BADF);
        }
        if fid == new && start.state.get().is_some() {
            return Err(Errno::BUSY);
        }
        let mut node = Arc::clone(&start.node);
        let mut parent = None;
        let mut qids = [Qid { kind: 0, version: 0, path: 0 }; MOST_NAMES];
        let mut walked = 0;
        for (name, qid) in names.iter().zip(&mut qids) {
            match self.child(&node, name) {
                Ok((next, found)) => {
                    *qid = found;
                    parent = Some(std::mem::replace(&mut node, Arc::new(next)));
                }
                Err(error) if walked == 0 => return Err(error),
                // The client sees how far it got.
                Err(_) => break,
            }
            walked += 1;
        }
        if walked == names.len() {
            let place = match (parent, names.iter().last()) {
                (Some(directory), Some(name)) => Some(Place { directory, name: name.into() }),
                _ => start.place().clone(),
            };
            let walked_to = Fid::new(node, place, start.user);
            if fid == new {
                self.fids.replace(fid, &start, walked_to)?;
            } else {
                self.fids.insert(new, walked_to)?;
            }
        }
        reply.u16(walked as u16);
        for qid in &qids[..walked] {
            reply.qid(*qid);
        }
        Ok(())
    }

    fn child(&self, directory: &Node, name: &[u8]) -> Result<(Node, Qid), Errno> {
        let (child, stat) = match (directory, &self.tree.root) {
            (Node::Host(directory), _) => directory.child(name)?,
            (Node::Around, Root::File { name: only, .. }) if **only == *name => self.tree.single()?,
            (Node::Around, _) => return Err(crate::node::step(name).err().unwrap_or(Errno::NOENT)),
        };
        Ok((Node::Host(child), self.tree.paths.qid(&stat)?))
    }

    /// Lets a fid go. What a new extended attribute was collected for is done now.
    pub(crate) fn clunk(&self, number: u32) -> Result<(), Errno> {
        let fid = self.fids.remove(number)?;
        if fid.locked.load(Ordering::Acquire) {
            self.locks().release(number);
        }
        match fid.state.get() {
            Some(State::NewAttribute(attribute)) => self.set_attribute(&fid, attribute),
            _ => Ok(()),
        }
    }

    /// Removes what the fid stands for by the name under which it was found, and lets the fid go.
    pub(crate) fn remove(&self, number: u32) -> Result<(), Errno> {
        let fid = self.fids.get(number)?;
        self.clunk(number)?;
        let node = fid.node.host()?;
        // The root is nobody's to remove.
        let Place { directory, name } = fid.place().clone().ok_or(Errno::BUSY)?;
        let directory = directory.directory()?;
        directory.still_has(&name, node)?;
        let directories = node.kind == rustix::fs::FileType::Directory;
        let flags = if directories { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        rustix::fs::unlinkat(directory, &*name, flags)
    }
}
