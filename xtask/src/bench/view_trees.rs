//! Trees that views are measured with, as tars and as plain directories.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::Path;

use super::sampling::rounds;
use crate::shell::Outcome;

/// Files in a directory.
const A_DIRECTORY: usize = 100;

/// A hundredth of `count` where only one round is taken.
pub(super) fn scaled(count: usize) -> usize {
    if rounds(2) == 1 { count.div_ceil(100) } else { count }
}

/// Files by name and content, in directories of a hundred or in the root.
pub(super) struct Tree {
    count: usize,
    directories: bool,
    name: fn(usize) -> String,
    content: fn(usize) -> Vec<u8>,
    first: usize,
}

impl Tree {
    /// Twenty files that no other number has.
    pub(super) fn small(number: usize) -> Self {
        let content = |at: usize| format!("{at}\n").repeat(50).into_bytes();
        Self {
            count: 20,
            directories: true,
            name: |at| format!("file{at}"),
            content,
            first: number * A_DIRECTORY,
        }
    }

    /// Files without content.
    pub(super) fn empty_files(count: usize) -> Self {
        Self { count, directories: true, name: |at| format!("file{at}"), content: |_| Vec::new(), first: 0 }
    }

    /// Files of some hundred bytes, each another.
    pub(super) fn small_files(count: usize) -> Self {
        let content = |at: usize| format!("{at}\n").repeat(60).into_bytes();
        Self { count, directories: true, name: |at| format!("file{at}"), content, first: 0 }
    }

    /// Sources in C that make one program.
    pub(super) fn c_project(count: usize) -> Self {
        let content = |at: usize| {
            let mut text = "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n".to_owned();
            for part in 0..40 {
                text += &format!(
                    "int f{at}_{part}(int n) {{ char b[64]; snprintf(b, sizeof b, \"%d\", n); \
                     for (int i = 0; i < n; i++) n += (int)strlen(b) * i % {}; return n; }}\n",
                    part + 3
                );
            }
            if at == 0 {
                text += "int main(void) { return f0_0(1) < 0; }\n";
            }
            text.into_bytes()
        };
        Self { count, directories: false, name: |at| format!("source{at}.c"), content, first: 0 }
    }

    fn files(&self) -> impl Iterator<Item = (String, Vec<u8>)> + '_ {
        (self.first..self.first + self.count).map(|at| {
            let name = (self.name)(at);
            let path = if self.directories { format!("d{}/{name}", at / A_DIRECTORY) } else { name };
            (path, (self.content)(at))
        })
    }

    pub(super) fn write_tar(&self, path: &Path) -> Outcome {
        let problem = |error: std::io::Error| format!("cannot write {}: {error}", path.display());
        let mut tar = tar::Builder::new(BufWriter::new(File::create(path).map_err(problem)?));
        let mut last = String::new();
        for (name, content) in self.files() {
            let mut header = tar::Header::new_ustar();
            header.set_mtime(1_700_000_000);
            header.set_uid(0);
            header.set_gid(0);
            if let Some((directory, _)) = name.split_once('/')
                && last != directory
            {
                last = directory.to_owned();
                header.set_entry_type(tar::EntryType::Directory);
                header.set_mode(0o755);
                header.set_size(0);
                tar.append_data(&mut header, directory, std::io::empty()).map_err(problem)?;
            }
            header.set_entry_type(tar::EntryType::Regular);
            header.set_mode(0o644);
            header.set_size(content.len() as u64);
            tar.append_data(&mut header, &name, &content[..]).map_err(problem)?;
        }
        tar.into_inner().and_then(|mut out| out.flush()).map_err(problem)
    }

    pub(super) fn write_directory(&self, path: &Path) -> Outcome {
        let problem = |error: std::io::Error| format!("cannot write below {}: {error}", path.display());
        fs::create_dir_all(path).map_err(problem)?;
        for (name, content) in self.files() {
            let file = path.join(name);
            if let Some(parent) = file.parent() {
                fs::create_dir_all(parent).map_err(problem)?;
            }
            fs::write(file, content).map_err(problem)?;
        }
        Ok(())
    }
}
