"""What a node says about its tensors.

Operators are many, the ways in which they relate channels are few; each module holds one of these ways, with all
that the stages need to know of it (structure, constants, masks, layouts, edits).
"""
