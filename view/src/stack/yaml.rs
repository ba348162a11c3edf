//! YAML without what makes it dangerous: the values of a document as strings, lists and maps of strings.
//!
//! The parser gives events; here they become values of bounded depth. An alias, by which a few lines would stand for any
//! number of values, is refused, and so is a name that is given twice.

use saphyr_parser::{Event, Parser, StrInput};
use serde_json::{Map, Value};

/// How deep values may lie in each other.
const DEPTH_MOST: usize = 16;

/// The one document of a text, as `T` has it. What is wrong with it is told in a sentence.
pub(super) fn parse<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    let mut document = Document { parser: Parser::new_from_str(text) };
    let value = loop {
        match document.next()? {
            Event::StreamStart | Event::DocumentStart(_) => {}
            Event::StreamEnd => return Err("it is empty".to_owned()),
            first => break document.value(&first, 0)?,
        }
    };
    match (document.next()?, document.next()?) {
        (Event::DocumentEnd, Event::StreamEnd) => {}
        _ => return Err("it has more than one document".to_owned()),
    }
    serde_json::from_value(value).map_err(|error| error.to_string())
}

struct Document<'a> {
    parser: Parser<'a, StrInput<'a>>,
}

impl<'a> Document<'a> {
    fn next(&mut self) -> Result<Event<'a>, String> {
        match self.parser.next_event() {
            Some(Ok((event, _))) => Ok(event),
            Some(Err(error)) => Err(error.to_string()),
            None => Err("it ends too early".to_owned()),
        }
    }

    fn value(&mut self, first: &Event<'a>, depth: usize) -> Result<Value, String> {
        if depth == DEPTH_MOST {
            return Err(format!("its values lie in each other more than {DEPTH_MOST} times deep"));
        }
        match first {
            Event::Scalar(text, ..) => Ok(Value::String(text.to_string())),
            Event::SequenceStart(..) => {
                let mut values = Vec::new();
                loop {
                    match self.next()? {
                        Event::SequenceEnd => return Ok(Value::Array(values)),
                        event => values.push(self.value(&event, depth + 1)?),
                    }
                }
            }
            Event::MappingStart(..) => {
                let mut values = Map::new();
                loop {
                    let name = match self.next()? {
                        Event::MappingEnd => return Ok(Value::Object(values)),
                        Event::Scalar(name, ..) => name.to_string(),
                        _ => return Err("a name in it is more than a word".to_owned()),
                    };
                    let event = self.next()?;
                    let value = self.value(&event, depth + 1)?;
                    if values.insert(name.clone(), value).is_some() {
                        return Err(format!("it has `{}` twice", name.escape_debug()));
                    }
                }
            }
            Event::Alias(_) => Err("it has an alias, `*name`: write out what that stands for".to_owned()),
            _ => Err("it is not YAML".to_owned()),
        }
    }
}
