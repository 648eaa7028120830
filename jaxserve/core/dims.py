"""The one key to array axes: the letters that end array names and fill einsum strings.

Arrays end in their axes (`q_TNH`, `kv.k_PKSH`, `page_RM`), host numpy arrays too; nothing else ends in capital
letters after an underscore. `tests/test_tidy.py` holds names and einsum strings to this key.
"""

DIMS: dict[str, str] = {
    "A": "entries of a step plan: one a scheduled sequence; or assignments of tokens to experts",
    "B": "sampling rows of a step",
    "C": "context slots gathered at once (pages x slots)",
    "D": "model width",
    "E": "experts",
    "F": "mlp hidden width",
    "G": "query heads a kv head: N / K; groups of quantisation",
    "H": "head dimension",
    "I": "width in (columns of a stored weight)",
    "J": "history: recent tokens kept a row",
    "K": "kv heads",
    "L": "layers",
    "M": "pages a sequence may hold",
    "N": "query heads",
    "O": "width out (rows of a stored weight)",
    "P": "pages in the pool",
    "Q": "query tokens of one attention tile",
    "R": "rows: places of sequences in device state",
    "S": "slots in a page",
    "T": "packed tokens of a step",
    "U": "page-table updates of a step",
    "V": "vocabulary",
    "W": "work items of an attention plan",
    "X": "experts a token; alternatives a logprob",
    "Y": "shaping slots: rows with penalties, bias or token masks",
    "Z": "groups of experts; slabs",
}
