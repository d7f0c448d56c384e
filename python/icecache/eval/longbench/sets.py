"""The protocol of the 21 sets: prompt, answer length, score, and what is special about each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Metric = Literal[
    "qa_f1", "qa_f1_zh", "rouge", "rouge_zh", "classification", "retrieval", "retrieval_zh", "count", "code"
]

PASSAGES: Final = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)
# "asconcisely" is the benchmark's spelling.
STORY: Final = (
    "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
    "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n"
    "Story: {context}\n\n"
    "Now, answer the question based on the story asconcisely as you can, using a single phrase if possible. "
    "Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:"
)
UNANSWERABLE: Final = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.\n\n'
)
ARTICLE: Final = (
    "You are given a scientific article and a question. Answer the question "
    + UNANSWERABLE
    + "Article: {context}\n\n Answer the question based on the above article "
    + UNANSWERABLE
    + "Question: {input}\n\nAnswer:"
)
BRIEFLY: Final = (
    "Read the following text and answer briefly.\n\n{context}\n\n"
    "Now, answer the following question based on the above text, only give me the answer and do not output any other "
    "words.\n\nQuestion: {input}\nAnswer:"
)
BRIEFLY_ZH: Final = (
    "阅读以下文字并用中文简短回答：\n\n{context}\n\n"
    "现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。\n\n问题：{input}\n回答："
)
ARTICLES_ZH: Final = (
    "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答："
)
REPORT: Final = (
    "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}\n\n"
    "Now, write a one-page summary of the report.\n\nSummary:"
)
MEETING: Final = (
    "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or "
    "more sentences.\n\nTranscript:\n{context}\n\n"
    "Now, answer the query based on the above meeting transcript in one or more sentences.\n\nQuery: {input}\nAnswer:"
)
NEWS: Final = (
    "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\n"
    "Now, write a one-page summary of all the news.\n\nSummary:"
)
MEETING_ZH: Final = "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结："
QUESTION_TYPES: Final = (
    "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}"
)
TRIVIA: Final = (
    "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
    "The following are some examples.\n\n{context}\n\n{input}"
)
DIALOGUE: Final = (
    "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}"
)
NEWS_TYPES_ZH: Final = "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}"
COUNT: Final = (
    "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
    "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other words, "
    "how many non-repeating paragraphs are there in total?\n\n{context}\n\n"
    "Please enter the final count of unique paragraphs after removing duplicates. The output format should only "
    "contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: "
)
RETRIEVAL: Final = (
    "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract is "
    "from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\n"
    "Please enter the number of the paragraph that the abstract is from. The answer format must be like "
    '"Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: '
)
RETRIEVAL_ZH: Final = (
    "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n"
    '下面是一个摘要\n\n{input}\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n答案是：'
)
CODE: Final = "Please complete the code given below. \n{context}Next line of code:\n"
CODE_OF_REPOSITORY: Final = "Please complete the code given below. \n{context}{input}Next line of code:\n"


@dataclass(frozen=True, slots=True)
class LongBenchSet:
    """One set.

    Parameters
    ----------
    name : str
        Also the name of its file.
    template : str
        Prompt with "{context}" and, where the set has questions, "{input}".
    new_tokens : int
        Most tokens of the answer.
    metric : str
        Key of `icecache.eval.longbench.metrics.METRICS`.
    count : int
        Documents of the official file.
    chat : bool, default=True
        Whether models with a chat template get it.
    first_line : bool, default=False
        Only the first line of the answer is scored.
    chinese : bool, default=False
        Language of text and prompt; the paper leaves these sets out.
    """

    name: str
    template: str
    new_tokens: int
    metric: Metric
    count: int = 200
    chat: bool = True
    first_line: bool = False
    chinese: bool = False

    @property
    def before(self) -> str:
        """Prompt up to the text."""
        return self.template.partition("{context}")[0]

    @property
    def after(self) -> str:
        """Prompt behind the text: the question."""
        return self.template.partition("{context}")[2]


SETS: Final = (
    LongBenchSet("narrativeqa", STORY, 128, "qa_f1"),
    LongBenchSet("qasper", ARTICLE, 128, "qa_f1"),
    LongBenchSet("multifieldqa_en", BRIEFLY, 64, "qa_f1", count=150),
    LongBenchSet("multifieldqa_zh", BRIEFLY_ZH, 64, "qa_f1_zh", chinese=True),
    LongBenchSet("hotpotqa", PASSAGES, 32, "qa_f1"),
    LongBenchSet("2wikimqa", PASSAGES, 32, "qa_f1"),
    LongBenchSet("musique", PASSAGES, 32, "qa_f1"),
    LongBenchSet("dureader", ARTICLES_ZH, 128, "rouge_zh", chinese=True),
    LongBenchSet("gov_report", REPORT, 512, "rouge"),
    LongBenchSet("qmsum", MEETING, 512, "rouge"),
    LongBenchSet("multi_news", NEWS, 512, "rouge"),
    LongBenchSet("vcsum", MEETING_ZH, 512, "rouge_zh", chinese=True),
    LongBenchSet("trec", QUESTION_TYPES, 64, "classification", chat=False, first_line=True),
    LongBenchSet("triviaqa", TRIVIA, 32, "qa_f1", chat=False, first_line=True),
    LongBenchSet("samsum", DIALOGUE, 128, "rouge", chat=False, first_line=True),
    LongBenchSet("lsht", NEWS_TYPES_ZH, 64, "classification", chat=False, first_line=True, chinese=True),
    LongBenchSet("passage_count", COUNT, 32, "count"),
    LongBenchSet("passage_retrieval_en", RETRIEVAL, 32, "retrieval"),
    LongBenchSet("passage_retrieval_zh", RETRIEVAL_ZH, 32, "retrieval_zh", chinese=True),
    LongBenchSet("lcc", CODE, 64, "code", count=500, chat=False),
    LongBenchSet("repobench-p", CODE_OF_REPOSITORY, 64, "code", count=500, chat=False),
)
BY_NAME: Final = {each.name: each for each in SETS}
ENGLISH: Final = tuple(each.name for each in SETS if not each.chinese)
"""The 16 sets of the paper's table."""
