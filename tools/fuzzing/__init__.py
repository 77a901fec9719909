"""The fuzzer of tools/fuzz: it changes valid messages and holds decoders to what they promise."""
