//! Who answers, with which source address, refused or dropped: the proxy against an independent reading of
//! the rules, over clusters drawn at random that change step by step.

#[cfg(test)]
mod draw;
#[cfg(test)]
mod facts;
#[cfg(test)]
mod objects;
#[cfg(test)]
mod oracle;
#[cfg(test)]
mod probes;
#[cfg(test)]
mod system;
